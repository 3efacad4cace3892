"""The keyword arguments of Python's functions as TypedDicts, written from the configuration.

    python -m tests.support.typed_settings      writes src/swlora/api/settings.py

Settings that all the same functions take are one class, and those of a function inherit from such.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from swlora.api.call import TAKEN
from swlora.cli.flags import described
from swlora.command_settings import keyword, setting_field
from swlora.config import RunSpec
from swlora.layer_policy import LayerPolicy

TARGET = Path(__file__).resolve().parents[2] / "src" / "swlora" / "api" / "settings.py"
FUNCTIONS = {  # those with settings, by their commands
    "identify": "IdentifySettings",
    "train": "TrainSettings",
    "eval": "EvalSettings",
    "generate": "GenerateSettings",
    "load": "LoadSettings",
    "merge": "MergeSettings",
    "export": "ExportSettings",
}
CALLED = {"eval": "evaluate"}
OWN = {"eval": {"model.name"}, "generate": {"model.name"}}  # which take other values there
HEAD = '''"""The settings of Python's functions as typed keyword arguments.

Made from the configuration by `make settings`, and held equal to it by a test: do not edit.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Literal, TypedDict
'''
MAY_BE_PATHS = ("model.name", "model.tokenizer", "data.name")


def source() -> str:
    """Return the text of the module."""
    takers: dict[str, tuple[str, ...]] = {}
    for command in FUNCTIONS:
        for path in TAKEN[command]:
            if path not in OWN.get(command, ()):
                takers[path] = (*takers.get(path, ()), command)
    sections = list(RunSpec.model_fields)
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path in sorted(takers, key=lambda path: sections.index(_section(path))):
        groups.setdefault((_section(path), takers[path]), []).append(path)
    parts = [HEAD]
    bases: dict[str, list[str]] = {command: [] for command in FUNCTIONS}
    for (_, commands), paths in groups.items():
        name = "_" + "".join(word.capitalize() for word in keyword(paths[0]).split("_"))
        fields = "\n".join(line for path in paths for line in _field(path))
        parts.append(f"{_class(name, ['TypedDict'])}\n{fields}\n")
        for command in commands:
            bases[command].append(name)
    for command, name in FUNCTIONS.items():
        said = f'    """The settings that `swlora.{CALLED.get(command, command)}` takes."""'
        parts.append(f"{_class(name, bases[command])}\n{said}\n")
    return "\n\n".join(parts)


def _section(path: str) -> str:
    return path.partition(".")[0]


def _class(name: str, bases: list[str]) -> str:
    line = f"class {name}({', '.join(bases)}, total=False):"
    if len(line) <= 100:
        return line
    return "\n".join(
        [f"class {name}(", *(f"    {base}," for base in bases), "    total=False,", "):"]
    )


def _field(path: str) -> Iterator[str]:
    yield f"    {keyword(path)}: {_type(path)}"
    if said := described(path):
        indent = {"initial_indent": "    ", "subsequent_indent": "    "}
        yield textwrap.fill(f'"""{said}"""', 100, break_on_hyphens=False, **indent)


def _type(path: str) -> str:
    """Return the type of what a person may give for a setting."""
    kind = setting_field(path).annotation
    kinds = [each for each in (get_args(kind) or (kind,)) if each is not type(None)]
    optional = " | None" if len(kinds) < len(get_args(kind)) else ""
    if get_origin(kind) is Literal:
        kinds = [kind]
    if get_origin(kind) is list:
        return "str | Sequence[str]"
    (kind,) = (get_args(each)[0] if get_origin(each) is Annotated else each for each in kinds)
    if path in MAY_BE_PATHS or kind is Path:
        return f"str | PathLike[str]{optional}"
    if kind is LayerPolicy:
        return "str | int | Sequence[int | str]"
    if get_origin(kind) is Literal:
        return "Literal[" + ", ".join(f'"{value}"' for value in get_args(kind)) + "]" + optional
    assert kind in (bool, int, float, str), path
    return f"{kind.__name__}{optional}"


if __name__ == "__main__":
    TARGET.write_text(source(), encoding="utf-8")
