"""The whole configuration of a run, read from a file and from flags."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from swlora.config.adapter import AdapterSpec
from swlora.config.data import DataSpec
from swlora.config.decode import DecodeSpec
from swlora.config.fields import Spec
from swlora.config.identify import IdentifySpec
from swlora.config.model import ModelSpec
from swlora.config.serve import ServeSpec
from swlora.config.train import SAY_THE_SAME, TrainSpec
from swlora.config.yaml_file import read_mapping, set_dotted
from swlora.errors import UserError
from swlora.settings import explain

SHARDED_METHODS = ("lora", "lora+", "rslora", "adalora")
# Methods that leave the weights below them alone, and so are tried as they are
TRIED_AS_THEMSELVES = ("lora", "lora+", "rslora", "dora")


class SharedSections(Spec):
    """The sections that a run and a study have alike."""

    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    adapter: AdapterSpec = AdapterSpec()
    train: TrainSpec = TrainSpec()
    decode: DecodeSpec = DecodeSpec()
    identify: IdentifySpec = IdentifySpec()


class RunSpec(SharedSections):
    """Everything one run needs."""

    serve: ServeSpec = Field(default=ServeSpec(), exclude=True)  # no part of what a run computes
    seed: int = Field(default=0, ge=0, lt=2**32)

    @property
    def trained_model(self) -> ModelSpec:
        """The model as it is loaded for a training: before, after and without its search alike."""
        return self.model.searchable if self.adapter.layers.needs_identification else self.model

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Self:
        if problem := sharding_problem(self):
            raise ValueError(problem)
        return self


def sharding_problem(spec: RunSpec) -> str | None:
    """Say why the model cannot be divided over processes (--shard); None where it can, or is not.

    A method that needs whole weights before the first step, or trains them, cannot.
    """
    adapter, train = spec.adapter, spec.train
    if not train.shard:
        return None
    if adapter.method not in SHARDED_METHODS and adapter.is_settled:
        able = f"{', '.join(SHARDED_METHODS[:-1])} or {SHARDED_METHODS[-1]}"
        return f"--method {adapter.method} needs whole weights; with --shard, use {able}"
    if adapter.layers.needs_search:
        return (
            f"--layers {adapter.layers} looks for layers with the whole model; with --shard, name "
            "them (swlora identify finds super weights)"
        )
    if train.engine == "plain":
        return "--shard works with --engine tree only; leave --engine plain out"
    return None


def rate_trial_problem(spec: RunSpec) -> str | None:
    """Say why no learning rate can be found for a new training; None where it can, or is given."""
    adapter, train = spec.adapter, spec.train
    if not train.find_learning_rate:
        return None
    if train.learning_rate is not None:
        return (
            "--find-learning-rate tries rates, and --learning-rate is set already: leave one of "
            "them out"
        )
    reason = None
    if adapter.start is not None:
        reason = "tries rates with fresh adapters, and --adapter starts from another"
    elif adapter.method not in TRIED_AS_THEMSELVES:
        reason = f"tries {', '.join(TRIED_AS_THEMSELVES)}, and not --method {adapter.method}"
    elif train.shard:
        reason = "needs the whole model, and --shard divides it"
    return reason and f"--find-learning-rate {reason}; leave it out, or give --learning-rate"


def load_spec(path: Path | None, overrides: dict[str, Any]) -> RunSpec:
    """Build a `RunSpec` from a YAML file and dotted overrides; an override of None is no override.

    Raises UserError with all problems in one line.
    """
    tree = {} if path is None else read_mapping(path)
    flags = [dotted for dotted, value in overrides.items() if value is not None]
    for dotted in flags:
        set_dotted(tree, dotted, overrides[dotted])
    for pair in SAY_THE_SAME.items():
        for ours, other in (pair, pair[::-1]):
            if ours in flags and other not in flags:  # the file's is replaced
                set_dotted(tree, other, None)
    try:
        return RunSpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, RunSpec, path, flags)) from error


def load_recorded_spec(path: Path, overrides: dict[str, Any]) -> RunSpec:
    """Build it from the config.yaml that a run left, never waiting for a pipe in its place; see
    `load_spec`.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"cannot read the configuration {path}: it is no regular file")
    return load_spec(path, overrides)
