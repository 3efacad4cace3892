"""Results as JSON: the one place where what was found becomes plain values.

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
from typing import Any

from pydantic import BaseModel

FLAT = {"place": "flat"}
IF_ANY = {"place": "if any"}
NO_KEY = {"place": "none"}


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
