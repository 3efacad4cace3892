"""The settings of a run that goes on: what it began with, and what was changed at which step.

    "settings": {"train.epochs": 3, ...}
    "changes": [{"step": 120, "settings": {"train.learning_rate": [0.002, 0.001]}}]

are in run.json; config.yaml has the settings for people. A change holds from the step after
`step` on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from swlora.config import RunSpec
from swlora.config.yaml_file import set_dotted
from swlora.errors import UserError
from swlora.settings import flag_name

CHANGEABLE = frozenset(
    {
        *("train.epochs", "train.max_steps", "train.batch_size", "train.order", "train.row_tokens"),
        *("train.learning_rate", "train.schedule", "train.warmup_fraction", "train.weight_decay"),
        *("train.max_grad_norm", "train.early_stopping", "train.on_nonfinite"),
        *("train.cache_gb", "train.shard", "adapter.start"),
        *("train.save_every", "train.checkpoint_every_s", "train.keep_checkpoints"),
        *("train.report_to", "train.project"),
        *("train.sample_prompts", "train.sample_every", "train.sample_tokens"),
        *("model.threads", "model.memory_gb"),
    }
)
OF_THE_CHECKPOINT = frozenset(  # other values make weights that it does not hold
    f"adapter.{name}" for name in ("method", "rank", "targets", "layers", "sparsity")
)
OF_THE_ADAPTER = OF_THE_CHECKPOINT | {"adapter.alpha", "adapter.dropout", "seed"}
NUMBER_OF_STEPS = frozenset({"train.epochs", "train.max_steps", "train.batch_size"})
Values = dict[str, Any]
SHOWN = 4  # of settings that differ


@dataclass(frozen=True)
class Change:
    """Settings that a run has from the step after `step` on: (was, is) by their dotted names.

    `extends` is True for one that is made now, to a run that was done.
    """

    step: int
    settings: Mapping[str, tuple[Any, Any]]
    extends: bool = False

    @classmethod
    def of(cls, noted: Mapping[str, Any]) -> Self:
        """Read a change from run.json."""
        settings = {name: (was, now) for name, (was, now) in noted["settings"].items()}
        return cls(int(noted["step"]), settings)

    def as_json(self) -> Values:
        """Return what run.json holds of it."""
        return {
            "step": self.step,
            "settings": {name: list(pair) for name, pair in self.settings.items()},
        }

    def undone(self, values: Values) -> Values:
        """Return settings as they were before it."""
        return values | {name: was for name, (was, _) in self.settings.items()}

    def __str__(self) -> str:
        return shown_differences(self.settings)


def flat(spec: RunSpec) -> Values:
    """Return all settings by their dotted names, as JSON's values."""
    return dict(_flat(spec.model_dump(mode="json"), ""))


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def as_spec(values: Values) -> RunSpec:
    """Return the configuration that settings by their dotted names are."""
    tree: Values = {}
    for name, value in values.items():
        set_dotted(tree, name, value)
    return RunSpec.model_validate(tree)


def differences(before: Values, now: Values) -> dict[str, tuple[Any, Any]]:
    """Return (was, is) of what differs, by names; other versions' own settings are left out."""
    return {
        name: (before[name], now[name])
        for name in now
        if name in before and before[name] != now[name]
    }


def shown_differences(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Write what differs for people: "train.epochs was 3 and is now 1", the first of many."""
    said = [
        f"{name} was {_said(was)} and is now {_said(now)}" for name, (was, now) in found.items()
    ]
    more = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return ", ".join(said[:SHOWN]) + more


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)


def changes_of(facts: Mapping[str, Any]) -> list[Change]:
    """Return the changes that run.json notes, in their order."""
    return [Change.of(noted) for noted in facts.get("changes", [])]


def check_changeable(spec: RunSpec, found: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise UserError, by name, for flags that a run which goes on cannot follow."""
    fixed = [n for n in found if n not in CHANGEABLE and not n.startswith("decode.")]
    # What is measured, and kept, is settled by then; a start may have been moved to another place.
    settled = ("train.early_stopping", "adapter.start")
    fixed += [name for name in settled if name in found and found[name][0] is None]
    if fixed:
        flags = ", ".join(f"{flag_name(name)} (it is {found[name][0]})" for name in fixed)
        raise UserError(
            f"a run that goes on keeps its {flags}; leave that out, or begin again in another "
            "--output"
        )
    if spec.adapter.method == "adalora" and (planned := sorted(NUMBER_OF_STEPS & set(found))):
        flags = ", ".join(map(flag_name, planned))
        raise UserError(
            f"adalora has planned its pruning over all its steps, which {flags} would change; "
            "leave that out, or begin again in another --output"
        )


def specs_by_step(spec: RunSpec, changes: Sequence[Change]) -> list[tuple[int, RunSpec]]:
    """Return (the step after which it holds, the settings) from the beginning to `spec`, the last.

    Of changes at one step the last counts.
    """
    values, held = flat(spec), {changes[-1].step if changes else 0: spec}
    for number in range(len(changes) - 1, -1, -1):
        values = changes[number].undone(values)
        since = changes[number - 1].step if number else 0
        if since not in held:
            held[since] = as_spec(values)
    return sorted(held.items(), key=lambda pair: pair[0])
