"""What a person fills in to train: checked as the command line would, and turned into its flags.

An empty field takes the default. Everything else keeps the default of the command line, too.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from swlora.config import ModelSpec, RunSpec, load_spec, rate_trial_problem
from swlora.errors import UserError
from swlora.idle_settings import check_effects
from swlora.settings import flag_name
from swlora.web.training.data_folder import DataFile

MAX_CHARACTERS = 300  # of a field
MAX_EPOCHS, MAX_STEPS = 1_000, 10_000_000
METHODS = ("lora", "lora+", "rslora", "dora", "pissa")  # whose adapters can be tried in the chat
LAYERS = ("all", "last:4", "every:4", "auto:0.5", "super")
# The fields of the form: the setting of each, and what it is called on the page
FIELDS = {
    "layers": ("adapter.layers", "Layers"),
    "method": ("adapter.method", "Method"),
    "rank": ("adapter.rank", "Rank"),
    "epochs": ("train.epochs", "Epochs"),
    "max_steps": ("train.max_steps", "Steps at most"),
    "learning_rate": ("train.learning_rate", "Learning rate"),
    "eval_share": ("data.eval_share", "Held-out share"),
    "columns": ("data.columns", "Columns"),
}
TICKS = {
    "find_learning_rate": ("train.find_learning_rate", "Find the learning rate"),
    "skip_bad_rows": ("data.skip_bad_rows", "Leave out bad rows"),
    "truncate": ("data.truncate", "Shorten long rows"),
}
NOT_OF_E2E = ("eval_share", "columns")  # it has its own
OF_DATA = ("columns",)  # that a look at the data takes, too
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


def defaults() -> dict[str, str]:
    """Return what the form shows at first."""
    spec = RunSpec()
    return {
        **dict.fromkeys((*FIELDS, *TICKS, "name"), ""),
        "layers": str(spec.adapter.layers),
        "method": spec.adapter.method,
        "rank": str(spec.adapter.rank),
    }


def training_flags(file: DataFile, values: Mapping[str, str], n_layers: int) -> list[str]:
    """Return the flags of `swlora train` for the fields of the form; UserError for wrong ones.

    Whatever the command refuses without weights and data is refused here, beside the form: it has
    forgotten what was filled in once the training has begun. `n_layers` are the model's.
    """
    given = _filled(file, values, FIELDS)
    if values.get("method", "lora") not in ("", *METHODS):
        raise UserError(f"Method: one of {', '.join(METHODS)}")
    given |= {setting: True for name, (setting, _) in TICKS.items() if values.get(name)}
    with _labelled():
        _check_training(_checked(given), given, n_layers)
    return flags(_with_data(file, given))


def data_flags(file: DataFile, values: Mapping[str, str]) -> list[str]:
    """Return the flags of `swlora data` for a file; UserError for wrong columns."""
    given = _filled(file, values, OF_DATA)
    with _labelled():
        _checked(given)
    return flags(_with_data(file, given))


def _filled(file: DataFile, values: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
    """Return the settings of the fields that are filled in; of E2E data, those that it takes."""
    left_out = NOT_OF_E2E if file.is_e2e else ()
    return {
        FIELDS[name][0]: text
        for name in names
        if name not in left_out and (text := values.get(name, "").strip())
    }


def _with_data(file: DataFile, given: Mapping[str, Any]) -> dict[str, Any]:
    return {**given, "data.name": str(file.path)}


def _checked(given: Mapping[str, Any]) -> RunSpec:
    """Return the configuration of the fields; UserError for one that cannot be read."""
    if any(isinstance(text, str) and len(text) > MAX_CHARACTERS for text in given.values()):
        raise UserError(f"a field holds more than {MAX_CHARACTERS} characters")
    return load_spec(None, dict(given))


def _check_training(spec: RunSpec, given: Collection[str], n_layers: int) -> None:
    """Raise UserError where fields that can be read do not go together, or with the model."""
    check_effects("train", spec, given)
    if problem := rate_trial_problem(spec):
        raise UserError(problem)
    if not spec.adapter.layers.needs_search:
        spec.adapter.layers.resolve(n_layers)
    train = spec.train
    if (train.epochs or 0) > MAX_EPOCHS or (train.max_steps or 0) > MAX_STEPS:
        raise UserError(
            f"the page takes {MAX_EPOCHS:,} epochs and {MAX_STEPS:,} steps at most; "
            "the command line takes more"
        )


@contextmanager
def _labelled() -> Iterator[None]:
    """Let a UserError of the body call settings as the page does."""
    try:
        yield
    except UserError as error:
        raise UserError(with_labels(str(error))[:400]) from error


def with_labels(message: str) -> str:
    """Return a message in which settings are called as they are on the page."""
    for setting, label in (FIELDS | TICKS).values():
        message = re.sub(rf"{flag_name(setting)}(?![\w-])", label, message)
    return message


def flags(given: Mapping[str, Any]) -> list[str]:
    """Return settings as arguments of the command line."""
    arguments: list[str] = []
    for setting, value in given.items():
        flag = flag_name(setting)
        arguments += [flag] if value is True else [f"{flag}={value}"]
    return arguments


def model_flags(spec: ModelSpec, name: str, only: Sequence[str] = ()) -> list[str]:
    """Return the flags of the model `name` with the settings of `spec`; `only` some of them."""
    others = spec.model_dump(exclude={"name"}, exclude_defaults=True)
    given = {"model.name": name, **{f"model.{field}": value for field, value in others.items()}}
    return flags({setting: v for setting, v in given.items() if not only or setting in only})


def check_run_name(name: str) -> None:
    """Raise UserError for a name that no folder of a run should have."""
    if not _RUN_NAME.fullmatch(name):
        raise UserError(
            "Name of the run: letters, digits, dots, hyphens and underscores, 64 at most, and a "
            "letter or digit first"
        )


def free_name(file: DataFile, taken: Collection[str]) -> str:
    """Return a name for a run on a file that is not `taken` yet."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", file.name.strip("/").rpartition("/")[2].split(".")[0])
    stem = stem.strip("-_")[:40] or "run"
    number = 1
    while (name := stem if number == 1 else f"{stem}-{number}") in taken:
        number += 1
    return name
