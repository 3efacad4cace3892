"""How settings are called, on the command line and in YAML, and what is said of wrong ones."""

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError

# Flags whose name is not simply the field's
FLAGS = {
    "model.name": "--model",
    "data.name": "--dataset",
    "data.eval_split": "--split",
    "adapter.start": "--adapter",
    "decode.batch_size": "--eval-batch-size",
}

SECRET = ("serve.api_key",)  # settings whose value is never shown


def flag_name(path: str) -> str:
    """Return the flag of a setting, such as --model for model.name."""
    return FLAGS.get(path, "--" + path.rpartition(".")[2].replace("_", "-"))


def explain(
    error: ValidationError, spec: type[BaseModel], path: Path | None, flags: Collection[str]
) -> str:
    """Say in one line what pydantic found wrong in a `spec`: with flags, then in the file `path`.

    flags: the dotted names of settings that came from the command line.
    """
    problems = problems_in(error, spec)
    by_flag = [p.line(flag_name(p.whole)) for p in problems if p.whole in flags]
    others = [p.line() for p in problems if p.whole not in flags]
    place = f"in {path}: " if path and others else ""
    return "; ".join([*by_flag, *([place + "; ".join(others)] if others else [])])


def problem_lines(error: ValidationError, spec: type[BaseModel]) -> list[str]:
    """Return each problem that pydantic found in a `spec` as "dotted.name: what is wrong"."""
    return [problem.line() for problem in problems_in(error, spec)]


def problems_in(error: ValidationError, spec: type[BaseModel]) -> "list[Problem]":
    """Return each problem that pydantic found in a `spec`."""
    return [Problem.of(found, spec) for found in error.errors()]


@dataclass(frozen=True)
class Problem:
    """Where a setting stands, by names of mappings and numbers in lists, and what is wrong."""

    place: tuple[str | int, ...]
    said: str

    @classmethod
    def of(cls, found: Any, spec: type[BaseModel]) -> Self:
        """Put into words what pydantic found."""
        setting = _dotted(found["loc"])
        if found["type"] == "extra_forbidden":
            said = f"there is no such setting{_hint(setting, setting_names(spec))}"
        elif found["type"] == "value_error":
            said = str(found["ctx"]["error"])
        else:
            given = "what was given" if setting in SECRET else _shown(found["input"])
            said = _plainly(found["msg"], found["type"], given)
        return cls(found["loc"], said)

    @property
    def setting(self) -> str:
        """The setting's dotted name."""
        return _dotted(self.place)

    @property
    def whole(self) -> str:
        """The setting without the number of an entry: of identify.prompt.0, identify.prompt."""
        return re.sub(r"\.\d+$", "", self.setting)

    def line(self, name: str = "") -> str:
        """Return it under `name` (default: the dotted name), unless it names flags itself."""
        name = name or self.setting or "configuration"
        return self.said if self.said.startswith("--") else f"{name}: {self.said}"


def _dotted(place: tuple[str | int, ...]) -> str:
    return ".".join(map(str, place))


def setting_names(spec: type[BaseModel]) -> list[str]:
    """Return the dotted names of all settings of a specification and of its sections."""
    names = []
    for name, field in spec.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            names += [f"{name}.{inner}" for inner in setting_names(section)]
        names.append(name)
    return names


def _hint(path: str, known: list[str]) -> str:
    """Return " (do you mean adapter.rank?)": a setting of that name elsewhere, or nearly of it."""
    section, _, name = path.replace("-", "_").rpartition(".")
    by_last_name: dict[str, list[str]] = {}
    for setting in known:
        by_last_name.setdefault(setting.rpartition(".")[2], []).append(setting)
    flag = "--" + name.replace("_", "-")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    nearest = difflib.get_close_matches(name, siblings, n=1)
    meant = (
        [k for k in known if FLAGS.get(k) == flag]
        or by_last_name.get(name, [])
        or [f"{section}.{near}".lstrip(".") for near in nearest]
        or [
            k
            for near in difflib.get_close_matches(name, by_last_name, n=1)
            for k in by_last_name[near]
        ]
    )
    return f" (do you mean {' or '.join(meant)}?)" if meant else ""


def _plainly(message: str, kind: str, given: str) -> str:
    """Say pydantic's "Input should be a valid integer, ..." as "must be a valid integer, not x"."""
    if kind == "model_type":
        return f"must be a mapping of settings, not {given}"
    said, n = re.subn(r"^(Input|String|List) should ", "must ", message)
    said = re.sub(r", (unable to parse|got a number) .*", "", said)
    return f"{said}, not {given}" if n and ", not " not in said else said


def _shown(given: object) -> str:
    text = repr(given)
    return text if len(text) <= 60 else text[:57] + "..."
