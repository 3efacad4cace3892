"""Results as JSON: the one place where what was found becomes plain values, and is read back.

A result is a tree of frozen dataclasses, and the names of its fields are the keys. What a key is
called, or where it stands, is said in the field's metadata:

    field(metadata=FLAT)            its own keys stand among those of what holds it; None has none
    field(metadata=IF_ANY)          no key where it is None
    field(metadata=NO_KEY)          no key at all: for use in Python only
    field(metadata=key("BLEU"))     another key than its name
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter

FLAT = {"place": "flat"}
IF_ANY = {"place": "if any"}
NO_KEY = {"place": "none"}

T = TypeVar("T")


def key(name: str) -> dict[str, str]:
    """Return the metadata of a field whose key is not its name."""
    return {"key": name}


def as_json(value: Any) -> Any:
    """Return a result as dicts, lists, strings, numbers and None; TypeError for anything else."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if is_dataclass(value):
        return _keys(value)
    raise TypeError(f"{type(value).__name__} has no place in a result")


def _keys(result: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields(result):
        value, place = getattr(result, field.name), field.metadata.get("place")
        if place == "none" or (value is None and place in ("flat", "if any")):
            continue
        if place == "flat":
            values |= as_json(value)
        else:
            values[field.metadata.get("key", field.name)] = as_json(value)
    return values


def from_json(kind: type[T], tree: Any, *, partial: bool = False) -> T:
    """Return the result of class `kind` that `as_json` made `tree` of; unknown keys are ignored.

    Fields without a key come back as None; `partial` reads missing keys as None too, since older
    versions wrote fewer. Raises KeyError for a missing key, ValueError or
    TypeError for a value of another type.
    """
    return cast(T, _read(kind, tree, partial))


def _read(kind: Any, tree: Any, partial: bool) -> Any:
    options = [option for option in get_args(kind) if option is not type(None)]
    if get_origin(kind) in (Union, UnionType) and len(options) == 1:  # X | None
        return None if tree is None else _read(options[0], tree, partial)
    if get_origin(kind) in (list, tuple) and is_dataclass(options[0]):
        items = TypeAdapter(list[Any]).validate_python(tree)
        return get_origin(kind)(_read(options[0], item, partial) for item in items)
    if partial and get_origin(kind) is dict and is_dataclass(options[-1]):
        entries = TypeAdapter(dict[str, Any]).validate_python(tree)
        return {name: _read(options[-1], entry, partial) for name, entry in entries.items()}
    if is_dataclass(kind):
        return _read_fields(kind, TypeAdapter(dict[str, Any]).validate_python(tree), partial)
    return TypeAdapter(kind).validate_python(tree)


def _read_fields(kind: Any, tree: dict[str, Any], partial: bool) -> Any:
    hints, values = get_type_hints(kind), {}
    for field in fields(kind):
        place = field.metadata.get("place")
        name = field.metadata.get("key", field.name)
        if place == "flat":
            there = not _is_optional(hints[field.name]) or _has_key_of(hints[field.name], tree)
            values[field.name] = _read(hints[field.name], tree, partial) if there else None
        elif place == "none" or (partial and name not in tree):
            values[field.name] = None
        elif name in tree or place != "if any":
            values[field.name] = _read(hints[field.name], tree[name], partial)
    return kind(**values)


def _is_optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _has_key_of(kind: Any, tree: dict[str, Any]) -> bool:
    """Say whether a flat result of the class in an optional `kind` stands in `tree`."""
    (own,) = [option for option in get_args(kind) if option is not type(None)]
    return any(f.metadata.get("key", f.name) in tree for f in fields(own))
