"""Which layers to train: read with the configuration, turned into numbers once a model is there.

    all | super | super+removal | auto:BUDGET | last:K | first:K | every:K | random:K:SEED | 2,11

`super` takes the layers of verified super weights, `super+removal` also those that take the super
activation out of the residual stream again. `auto:BUDGET` measures (`training.layer_choice`): it
stays within that share of the time of all layers, or takes all of them. `every:K` takes K evenly
spaced layers that include the last one; `random:K:SEED` draws K.
"""

import difflib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from swlora.errors import NoSuperWeightError, UserError

Kind = Literal["all", "super", "super+removal", "auto", "last", "first", "every", "random", "list"]
POLICIES = (
    "all, super, super+removal, auto:BUDGET, last:K, first:K, every:K, random:K:SEED "
    "or a list such as 2,11"
)
EN_DASH = "–"
_SHAPES: dict[Kind, str] = {  # what follows a name; a list has none, the budget is read apart
    "all": r"",
    "super": r"",
    "super+removal": r"",
    "last": r":(\d+)",
    "first": r":(\d+)",
    "every": r":(\d+)",
    "random": r":(\d+):(\d+)",
}


@dataclass(frozen=True)
class VerifiedLayers:
    """What `identify` found: layers of verified super weights, and where their activation ends."""

    super_layers: Sequence[int]
    removal_layers: Sequence[int]


@dataclass(frozen=True)
class LayerPolicy:
    """A policy that was read: its text without spaces, and what that says.

    `numbers` are the layers of a list, or K and the seed; `time_budget` is that of `auto`, a share
    of all layers' time.
    """

    text: str
    kind: Kind
    numbers: tuple[int, ...] = ()
    time_budget: float | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def needs_identification(self) -> bool:
        """Whether the layers depend on verified super weights."""
        return self.kind in ("super", "super+removal")

    @property
    def needs_search(self) -> bool:
        """Whether the layers are found by running the model, and not by counting."""
        return self.needs_identification or self.kind == "auto"

    @property
    def has_first_layer(self) -> bool:
        """Whether layer 0 is among the layers, whatever the model."""
        return self.kind in ("all", "first") or (self.kind == "list" and 0 in self.numbers)

    def resolve(self, n_layers: int, verified: VerifiedLayers | None = None) -> list[int]:
        """Return sorted layer numbers in a model of `n_layers` blocks.

        `verified` is needed by `super` and `super+removal` only. Raises UserError for layers out of
        range, for no layer at all, and for `auto`, which counts nothing.
        """
        match self.kind:
            case "all":
                return list(range(n_layers))
            case "list":
                return self._listed(n_layers)
            case "super" | "super+removal":
                return self._verified(verified)
            case "auto":
                raise UserError(f"--layers {self} needs a measurement of the layers")
        k = self.numbers[0]
        if k > n_layers:
            raise UserError(f"--layers {self}: K must be from 1 to {n_layers}, the model's layers")
        match self.kind:
            case "last":
                return list(range(n_layers - k, n_layers))
            case "first":
                return list(range(k))
            case "every":
                return sorted({round((i + 1) * n_layers / k) - 1 for i in range(k)})
            case "random":
                return sorted(random.Random(self.numbers[1]).sample(range(n_layers), k))

    def _listed(self, n_layers: int) -> list[int]:
        outside = [layer for layer in self.numbers if layer >= n_layers]
        if outside:
            raise UserError(
                f"layer {outside[0]} does not exist; this model has layers 0 to {n_layers - 1}"
            )
        return sorted(set(self.numbers))

    def _verified(self, verified: VerifiedLayers | None) -> list[int]:
        if verified is None:
            raise UserError(f"--layers {self} needs the layers that identify verified")
        if not verified.super_layers:
            raise NoSuperWeightError(
                f"no super weight was verified in this model, so --layers {self} names no layer; "
                "choose all, last:K or a list"
            )
        removal = verified.removal_layers if self.kind == "super+removal" else ()
        return sorted({*verified.super_layers, *removal})


def parse_policy(text: str) -> LayerPolicy:
    """Read a policy; UserError, with the nearest one, where it is none in whatever model."""
    text = text.replace(" ", "")
    if re.fullmatch(r"\d+(,\d+)*", text, re.ASCII):
        return LayerPolicy(text, "list", tuple(map(int, text.split(","))))
    name, _, rest = text.partition(":")
    if name == "auto":
        return LayerPolicy(text, "auto", time_budget=_share(text, rest))
    for kind, shape in _SHAPES.items():
        if found := re.fullmatch(re.escape(kind) + shape, text, re.ASCII):
            numbers = tuple(map(int, found.groups()))
            if numbers and numbers[0] < 1:
                raise UserError(f"{text!r} names no layer: K must be 1 or more")
            return LayerPolicy(text, kind, numbers)
    raise UserError(f"{text!r} is not understood{_hint(name, rest)}; use {POLICIES}")


def policy_or_none(text: str) -> LayerPolicy | None:
    """Return the policy that a text is; None where it is none."""
    try:
        return parse_policy(text)
    except UserError:
        return None


def layer_ranges(layers: Sequence[int], dash: str = "-") -> str:
    """Write [0, 1, 2, 5] as "0-2, 5"; `dash` is `EN_DASH` in a printed text."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}{dash}{p[-1]}" for p in parts)


def _share(text: str, budget: str) -> float:
    """Read the budget of `auto:BUDGET`, above 0 and up to 1."""
    share = float(budget) if re.fullmatch(r"\d+\.?\d*|\.\d+", budget, re.ASCII) else 0.0
    if not 0 < share <= 1:
        raise UserError(
            f"{text!r} is not understood: auto:0.5 takes at most half of the time that all layers "
            "take"
        )
    return share


def _hint(name: str, rest: str) -> str:
    """Return " (do you mean last:4?)" where a kind has nearly that name."""
    near = difflib.get_close_matches(name, [*_SHAPES, "auto"], n=1)
    meant = f"{near[0]}:{rest}" if near and rest else "".join(near)
    return f" (do you mean {meant}?)" if near and near[0] != name else ""
