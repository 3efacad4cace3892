"""What all sections of a configuration are made of: their base, and types of their values."""

from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
)
from pydantic_core import PydanticKnownError

from swlora.errors import UserError
from swlora.layer_policy import LayerPolicy, parse_policy
from swlora.paths import expanded


class Spec(BaseModel):
    """Base of all specifications: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def split_list(value: object) -> object:
    """Turn `"a,b"` or `["a,b", "c"]` into `["a", "b", "c"]`; leave other types alone."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    items: list[object] = []
    for item in value:
        items += [part.strip() for part in item.split(",")] if isinstance(item, str) else [item]
    return [item for item in items if item != ""]


SPLIT = BeforeValidator(split_list, json_schema_input_type=str | list[str])


def join_list(value: object) -> object:
    """Turn `[2, 11]`, `["2", "11"]` or 2 into "2,11" or "2"; leave other types alone."""
    items = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(item, int | str) for item in items):
        return ",".join(map(str, items))
    return value


NameList = Annotated[list[str], SPLIT]
HomePath = Annotated[Path, AfterValidator(expanded)]  # a shell expands ~, YAML does not


def one_or_many(value: object) -> object:
    """Turn `"a, b"` into `["a, b"]`; leave lists alone."""
    return [value] if isinstance(value, str) else value


_Text = Annotated[str, StringConstraints(min_length=1)]
PromptList = Annotated[
    list[_Text], BeforeValidator(one_or_many, json_schema_input_type=_Text | list[_Text])
]


def read_policy(value: object) -> LayerPolicy:
    """Return the layer policy that a text is; ValueError where it is none."""
    if isinstance(value, LayerPolicy):
        return value
    if not isinstance(value, str):
        raise PydanticKnownError("string_type")
    try:
        return parse_policy(value)
    except UserError as error:
        raise ValueError(str(error)) from error


JOINED = BeforeValidator(join_list, json_schema_input_type=str | int | list[int | str])
Layers = Annotated[LayerPolicy, PlainValidator(read_policy), PlainSerializer(str), JOINED]
