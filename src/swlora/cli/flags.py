"""Command-line flags made from the configuration's fields: one default, one help text, one type.

A verb names the settings it takes; each becomes an option whose value overrides the field.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from swlora.command_settings import setting_field
from swlora.config.fields import JOINED
from swlora.settings import flag_name


def setting_options(
    paths: Sequence[str], defaults: Mapping[str, Any]
) -> dict[str, inspect.Parameter]:
    """Return an option for each named setting, None where it is not given.

    `defaults` are shown in place of the fields' own; the verb sees to it that they hold.
    """
    return {path: _option(path, defaults.get(path)) for path in paths}


def _option(path: str, shown_default: Any) -> inspect.Parameter:
    group, _, name = path.partition(".")
    field = setting_field(path)
    flag = flag_name(path)
    kind = _type(field)
    negative = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    panel = group.capitalize() if name else None
    option = typer.Option(
        negative, help=described(path, shown_default), rich_help_panel=panel, show_default=False
    )
    return inspect.Parameter(
        path.replace(".", "__"),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def described(path: str, shown_default: Any = None) -> str:
    """Say what a setting is, its values where they are few, and its default where there is one."""
    field = setting_field(path)
    default = shown_default
    if default is None:
        default = field.get_default(call_default_factory=True)
    shown = ",".join(default) if isinstance(default, list) else default
    text = "; ".join(filter(None, (_choices(field), field.description)))
    return text if default in (None, []) else f"{text} [default: {shown}]".strip()


def _choices(field: FieldInfo) -> str:
    """Return the values of a setting that has a few as "dev or test"; "" for another setting."""
    kinds = (field.annotation, *get_args(field.annotation))
    values = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    return " or ".join(filter(None, (", ".join(values[:-1]), *values[-1:])))


def _type(field: FieldInfo) -> Any:
    """Return what typer shall parse: pydantic checks the rest."""
    annotation = field.annotation
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is list or JOINED in field.metadata:
        return list[str]  # the flag may be repeated
    if arguments and all(isinstance(a, str) for a in arguments):
        return str
    plain = arguments[0] if arguments else annotation
    if get_origin(plain) is Annotated:
        plain = get_args(plain)[0]
    return plain if plain in (int, float, bool, Path) else str
