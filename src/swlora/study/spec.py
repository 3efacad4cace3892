"""What a study compares: a run's configuration, a list of arms, and how they are made comparable.

    arms:
      - lora                                  a method in the layers of `adapter.layers`
      - super                                 a layer policy, trained with `adapter.method`
      - {name: top, layers: last:4, rank: 16, train.weight_decay: 0.01, seeds: [0]}

Bare names, and settings beside an arm's name, are short for its dotted `overrides`.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from swlora.config import (
    DEFAULT_RATE,
    METHOD_NAMES,
    OPTIONAL_SETTINGS,
    DecodeSpec,
    RunSpec,
    SharedSections,
    TrainSpec,
    method_rate,
    settings_of,
)
from swlora.config.fields import NameList, Spec
from swlora.config.train import OF_HELD_OUT
from swlora.config.yaml_file import set_dotted
from swlora.layer_policy import LayerPolicy, policy_or_none

SHORT = {
    "method": "adapter.method",
    "layers": "adapter.layers",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "epochs": "train.epochs",
}

MOST_FURTHER = 10
RATE_STEPS = (0.5, 1, 2, 4, 8)  # more of them above 1: short runs want more than whole ones
# Where a study says nothing: its arms are alike whatever their data, and one that is old goes on
EPOCHS, BATCH_SIZE = 1, 32
RATE = 2e-3  # of LoRA, in trials of layers; arms choose theirs

PositiveRate = Annotated[float, Field(gt=0)]


def rate_name(rate: float) -> str:
    """Return how folders and tables call a learning rate: by six digits."""
    return f"{rate:g}"


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("a value is listed twice")
    return values


def _distinct_rates(rates: list[float]) -> list[float]:
    if len({rate_name(rate) for rate in rates}) < len(rates):
        raise ValueError("a rate is listed twice; six digits of it count")
    return rates


Rates = Annotated[list[PositiveRate], Field(min_length=1), AfterValidator(_distinct_rates)]
Seeds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1), AfterValidator(_distinct)
]


class ArmSpec(Spec):
    """One way to train: settings of `adapter` and `train` that differ from the study's own."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9+._-]*$", max_length=60)
    overrides: dict[str, Any] = Field(default_factory=dict, description="by dotted names")
    rates: Rates | None = Field(default=None, description="its own grid of learning rates")
    seeds: Seeds | None = Field(default=None, description="default: those of the study")
    control_seeds: Seeds | None = Field(default=None, description="default: those of the arm")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """Accept a bare name, and settings beside the name: `rank: 16`, `train.epochs: 3`."""
        given: dict[Any, Any] = {"name": value} if isinstance(value, str) else value
        if not (isinstance(given, dict) and isinstance(given.get("overrides", {}), dict)):
            return value
        given = dict(given)
        name, overrides = given.get("name"), dict(given.get("overrides", {}))
        for key in [k for k in given if k in SHORT or (isinstance(k, str) and "." in k)]:
            overrides[SHORT.get(key, key)] = given.pop(key)
        if isinstance(name, str):
            if name in METHOD_NAMES:
                overrides.setdefault("adapter.method", name)
            elif policy := policy_or_none(name):
                overrides.setdefault("adapter.layers", name)
                given["name"] = folder_name(policy)
            elif isinstance(value, str):
                raise ValueError(
                    f"{name!r} is neither a method ({', '.join(METHOD_NAMES)}) nor a layer policy; "
                    "describe it as {name: ..., layers: ...}"
                )
        return {**given, "overrides": overrides}


class RateSearch(Spec):
    """How each arm's learning rate is chosen: the lowest held-out NLL after short runs."""

    grid: Rates | None = Field(
        default=None,
        description="default: 0.5 to 8 times the default of an arm's method and layers, doubling",
    )
    extend: int = Field(
        default=0,
        ge=0,
        le=MOST_FURTHER,
        description="further rates of an arm, at most, beyond the edge where its best lies",
    )
    train_rows: int = Field(default=640, ge=1, description="the first N rows of the training data")
    eval_prompts: int = Field(default=64, ge=1, description="the first N prompts of the dev split")
    max_steps: int | None = Field(default=None, ge=1, description="steps of a short run")
    seed: int = Field(default=1000, ge=0, lt=2**32, description="one that no arm is measured with")


class BeamSearch(Spec):
    """Arms whose adapters are evaluated once more, with beam search."""

    arms: NameList = Field(default_factory=list)
    seeds: Seeds | None = Field(default=None, description="default: those of the arm")
    decode: DecodeSpec = DecodeSpec(num_beams=10, length_penalty=0.9, no_repeat_ngram_size=4)


class Margin(Spec):
    """By how much an arm may be worse than the baseline and still count as no worse."""

    bleu: float = Field(default=0.5, gt=0, description="points of 100")
    nll: float = Field(default=0.01, gt=0, description="nats a completion token")


class StudySpec(SharedSections):
    """Everything one study needs; the sections of a run's configuration are meant for all arms."""

    train: TrainSpec = Field(default=TrainSpec(), validate_default=True)
    arms: list[ArmSpec] = Field(min_length=1)
    seeds: Seeds = Field(default_factory=lambda: [0])
    baseline: str = Field(default="lora", description="the arm that the others are compared with")
    rate: RateSearch = RateSearch()
    beam: BeamSearch = BeamSearch()
    margin: Margin = Margin()
    controls: bool = Field(default=True, description="add control arms to layers that were found")
    random_draws: int = Field(default=2, ge=1, le=10, description="random controls of such an arm")

    @field_validator("train")
    @classmethod
    def _same_for_all_runs(cls, train: TrainSpec) -> TrainSpec:
        """Fix what a run alone would choose by its data: the short runs have fewer rows."""
        fixed = _not_by_data(train)
        if train.learning_rate is None:
            fixed["learning_rate"] = RATE
        if train.eval_every_steps is None and not train.asked_of_held_out:
            fixed["eval_every_steps"] = 0
        return train.model_copy(update=fixed)

    def chooses_rate(self, arm: ArmSpec) -> bool:
        """Whether an arm has several rates, of which short runs choose one."""
        return len(arm.rates or self.rate.grid or RATE_STEPS) > 1

    def run_spec(self, overrides: dict[str, Any]) -> RunSpec:
        """Return the configuration of an arm; ValidationError or UserError for impossible ones.

        Where an arm has a method of its own, the study's settings that this method does not have
        are left out. One that asks for something of held-out rows measures them, as a run alone
        does, where the study says nothing of it. The learning rate is the one with which its layers
        are tried: arms choose theirs.
        """
        tree = self.model_dump(include=set(SharedSections.model_fields))
        method = overrides.get("adapter.method")
        for name in OPTIONAL_SETTINGS - settings_of(method) if method else ():
            del tree["adapter"][name]
        if overrides.keys() & {f"train.{name}" for name in OF_HELD_OUT}:
            tree["train"]["eval_every_steps"] = self.train.eval_every_steps or None
        for dotted, value in overrides.items():
            set_dotted(tree, dotted, value)
        run = RunSpec.model_validate(tree)
        rate = float(f"{RATE * method_rate(run.adapter) / DEFAULT_RATE:.3g}")
        fixed = {**_not_by_data(run.train), "learning_rate": rate}
        return run.model_copy(update={"train": run.train.model_copy(update=fixed)})


def _not_by_data(train: TrainSpec) -> dict[str, Any]:
    """Return the epochs and rows a step that are not given, which a run would fit to its data."""
    fixed = {"epochs": EPOCHS, "batch_size": BATCH_SIZE}
    return {name: value for name, value in fixed.items() if getattr(train, name) is None}


def folder_name(policy: LayerPolicy) -> str:
    """Turn a policy into a name that can be a folder: last:4 -> last-4, 2,11 -> layers-2-11."""
    name = re.sub(r"[:,]", "-", policy.text)
    return f"layers-{name}" if policy.kind == "list" else name
