"""A recipe: one training, written as `steps=50 batch=16 order=pairs rank=16 rate=1e-3`.

What is not named has its default. A key that would have no effect is refused, such as a damping for
an optimiser that has none, so that two texts that differ are two trainings.
"""

import math
import re
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self, get_args

from swlora.data.steps import StepOrder
from swlora.errors import UserError
from swlora.layer_policy import parse_policy

DATA = ("e2e", "chats")
CHOICES = ("random", "hard", "easy", "middle", "diverse")
METHODS = ("lora", "lora+", "dora", "adalora", "pissa", "full", "supertuning", "miss")
SCHEDULES = "linear, cosine, constant or sqrt:SHARE, such as sqrt:0.2"
OPTIMIZERS: dict[str, frozenset[str]] = {  # which settings each one has
    "adamw": frozenset({"scale", "beta1", "beta2", "decay", "clip"}),
    "scaled-adamw": frozenset({"scale", "beta1", "beta2", "decay", "clip", "damping"}),
    "lora-rite": frozenset({"scale", "beta1", "beta2", "decay", "clip"}),
    "lora-muon": frozenset({"beta1", "decay"}),
}
_OPTIONAL = frozenset().union(*OPTIMIZERS.values())
_OF_PAIRS = frozenset({"b_alone", "gradient_start"})  # of an A and a B that start as LoRA's
_WITHOUT: dict[str, frozenset[str]] = {  # which settings of LoRA a method does not have
    "adalora": _OF_PAIRS,
    "pissa": _OF_PAIRS,
    "full": _OF_PAIRS | {"rank", "scale"},
    "supertuning": _OF_PAIRS | {"rank", "scale"},
    "miss": _OF_PAIRS | {"scale"},
}
_SCALE = re.compile(r"(?P<number>[\d.e+-]+)(?P<over>/r|/sqrt\(r\))?")


@dataclass(frozen=True)
class Recipe:
    """One training; the fields are the keys of its text.

    data: e2e, or chats that a grammar makes. prompts: rows of the first N prompts of the training
    file only. rows, choice: of those, so many rows, two of a prompt at a time, drawn at random, by
    the loss of the base model (hard, easy, middle) or for prompts that are unlike each other
    (diverse). method: one of `swlora train` (rsLoRA is a scale), or miss (a fixed A, B alone).
    scale: of the product B A: a number, NUMBER/r (LoRA's alpha / r) or NUMBER/sqrt(r) (rsLoRA's).
    targets: all, attention, mlp, names of projections, or plop:N, the N kinds that PLoP finds.
    gradient_start: A begins as the leading right singular vectors of the gradient of each weight,
    times this. b_alone: A is left as it is in the first N steps. beta1 is lora-muon's momentum.
    schedule: sqrt:SHARE is constant, then falls as 1 - sqrt over the last SHARE of the steps.
    average: the adapter in the end is the mean of those that the last steps left, this share of
    all. jump: every N steps the last change is repeated for as long as that lowers the loss of rows
    held out from training (Fast Forward).
    """

    steps: int
    batch: int = 32
    order: str = "prompts"
    data: str = "e2e"
    prompts: int | None = None
    rows: int | None = None
    choice: str | None = None
    method: str = "lora"
    rank: int = 4
    scale: str = "8"
    targets: str = "all"
    layers: str = "all"
    gradient_start: float | None = None
    optimizer: str = "adamw"
    rate: float = 4e-3
    beta1: float = 0.9
    beta2: float = 0.999
    decay: float = 0.0
    clip: float = 1.0
    damping: float = 0.01
    b_alone: int = 0
    schedule: str = "linear"
    warmup: float = 0.05
    average: float = 0.0
    jump: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a recipe; UserError says what is wrong with it."""
        given: dict[str, str] = {}
        for word in text.split():
            key, equals, value = word.partition("=")
            if not equals or not value:
                raise _wrong(text, f"{word!r} is not key=value")
            if key in given:
                raise _wrong(text, f"{key} is there twice")
            given[key] = value
        kinds = {field.name: field.type for field in fields(cls)}
        if unknown := [key for key in given if key not in kinds]:
            raise _wrong(text, f"no key is called {unknown[0]!r}; there are {', '.join(kinds)}")
        if "steps" not in given:
            raise _wrong(text, "steps=N is missing")
        values = {key: _read(text, key, value, kinds[key]) for key, value in given.items()}
        recipe = cls(**values)
        if problem := recipe._problem() or recipe._without_effect(set(given)):
            raise _wrong(text, problem)
        return recipe

    def __str__(self) -> str:
        """Write the recipe so that `parse` reads it: what differs from the defaults, in order."""
        changed = {
            f.name: value
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default or f.default is MISSING
        }
        return " ".join(f"{key}={value}" for key, value in changed.items())

    def settings(self) -> dict[str, Any]:
        """Return every key with its value."""
        return asdict(self)

    @property
    def scale_value(self) -> float:
        """The number that B A is multiplied by."""
        if self.method == "miss" or self.optimizer == "lora-muon":
            return 1.0
        found = _SCALE.fullmatch(self.scale)
        assert found, self.scale
        over = {None: 1.0, "/r": self.rank, "/sqrt(r)": math.sqrt(self.rank)}[found["over"]]
        return float(found["number"]) / over

    @property
    def sqrt_share(self) -> float | None:
        """The last share of the steps over which the rate falls as 1 - sqrt; None without."""
        name, _, share = self.schedule.partition(":")
        return float(share) if name == "sqrt" else None

    @property
    def n_averaged(self) -> int:
        """The steps at the end after which the adapters are averaged; 0 for none."""
        return round(self.average * self.steps)

    def _problem(self) -> str | None:
        """Say which value no training can have."""
        for key, known in (
            ("order", get_args(StepOrder)),
            ("data", DATA),
            ("choice", (None, *CHOICES)),
            ("method", METHODS),
            ("optimizer", tuple(OPTIMIZERS)),
        ):
            if (value := getattr(self, key)) not in known:
                return f"{key}={value} is none of {', '.join(filter(None, known))}"
        for key in ("steps", "batch", "rank", "rate", "clip", "damping"):
            if getattr(self, key) <= 0:
                return f"{key} must be above 0"
        for key in ("prompts", "rows", "gradient_start"):
            if (value := getattr(self, key)) is not None and value <= 0:
                return f"{key} must be above 0"
        for key in ("beta1", "beta2", "warmup"):
            if not 0 <= getattr(self, key) < 1:
                return f"{key} must be from 0 to below 1"
        if not 0 <= self.decay * self.rate < 1:
            return "decay times rate must be from 0 to below 1"
        if not 0 <= self.average <= 1 or (self.average and self.n_averaged < 2):
            return "average must be a share of the steps that holds at least two of them"
        if not 0 <= self.b_alone <= self.steps or not 0 <= self.jump < self.steps:
            return "b_alone and jump count steps, and there are no more than steps"
        return self._wrong_text()

    def _wrong_text(self) -> str | None:
        scale = _SCALE.fullmatch(self.scale)
        if not scale or not _is_number(scale["number"]) or float(scale["number"]) <= 0:
            return f"scale={self.scale} is none of NUMBER, NUMBER/r, NUMBER/sqrt(r)"
        name, colon, share = self.schedule.partition(":")
        plain = name in ("linear", "cosine", "constant") and not colon
        if not plain and not (name == "sqrt" and _is_number(share) and 0 < float(share) <= 1):
            return f"schedule={self.schedule} is none of {SCHEDULES}"
        if self.targets.startswith("plop") and not re.fullmatch(r"plop:[1-9]\d*", self.targets):
            return "targets=plop:N takes N kinds of projections, such as plop:3"
        policy = parse_policy(self.layers)
        return f"layers={policy} has to be found first" if policy.needs_search else None

    def _without_effect(self, given: set[str]) -> str | None:
        """Say which of the keys that were named would change nothing."""
        if ignored := sorted(given & (_OPTIONAL - OPTIMIZERS[self.optimizer])):
            return f"{self.optimizer} has no {ignored[0]}"
        if self.choice is not None and self.rows is None:
            return "choice needs rows=N, how many are chosen"
        ignored = sorted(given & _WITHOUT.get(self.method, frozenset()))
        if ignored:
            return f"{self.method} has no {ignored[0]}"
        if self.method != "lora" and self.optimizer != "adamw":
            return f"{self.method} is trained with adamw, not with {self.optimizer}"
        return None


def _read(text: str, key: str, value: str, kind: Any) -> Any:
    kinds = get_args(kind) or (kind,)
    if str in kinds:
        return value
    wanted = int if int in kinds else float
    try:
        read = wanted(value)
    except ValueError:
        read = math.nan
    if not math.isfinite(read):
        raise _wrong(text, f"{key}={value} is no {'whole ' if wanted is int else ''}number")
    return read


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _wrong(text: str, problem: str) -> UserError:
    return UserError(f"recipe {text.strip()!r}: {problem}")
