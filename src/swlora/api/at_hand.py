"""A model that is loaded already in the place of one that is named: what may stand beside it."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from swlora.command_settings import MODEL, keyword
from swlora.config import ModelSpec
from swlora.errors import UserError

if TYPE_CHECKING:
    from swlora.models.load import LoadedModel


def model_at_hand(
    model: object, settings: Mapping[str, object], adapter: object
) -> "LoadedModel | None":
    """Return a model that is loaded already; None where `model` names one, or is None.

    Raises UserError for anything else, and for what would be without effect beside it.
    """
    if isinstance(model, str | PathLike | None):
        return None
    from swlora.models.load import LoadedModel

    if not isinstance(model, LoadedModel):
        raise UserError(
            "model is a name, a folder, or what swlora.load returns (of a training "
            f"trained.loaded), not {type(model).__name__}"
        )
    given = {"adapter": adapter, **settings}
    names = ["adapter", *(keyword(path) for path in MODEL)]
    if idle := sorted(name for name in names if given.get(name) is not None):
        raise UserError(
            f"the model is loaded already: leave out {', '.join(idle)}, or give it to swlora.load"
        )
    return model


def spec_at_hand(loaded: "LoadedModel", said: ModelSpec, config: Path | None) -> ModelSpec:
    """Return the specification of a model that is loaded already.

    `said` is the section `model` of the file `config`. Raises UserError where that is of another
    model, revision, precision or device.
    """
    from swlora.models.builtin import flag_of, is_named
    from swlora.models.load import commit_of

    dtype, device = str(loaded.model.dtype).removeprefix("torch."), loaded.model.device
    other = ""
    if "name" in said.model_fields_set and not is_named(said.name, loaded.name):
        other = f"the model {said.name}, and the one that is given is {loaded.source}"
    elif said.revision and commit_of(loaded.name, said.revision) != loaded.revision:
        other = f"revision {said.revision}, and the model that is given is of {loaded.revision}"
    elif said.dtype not in ("auto", dtype):
        other = f"dtype {said.dtype}, and the model that is given has {dtype}"
    elif said.device not in ("auto", device.type, str(device)):
        other = f"device {said.device}, and the model that is given is on {device}"
    if other:
        raise UserError(
            f"{config} says {other}: leave that out of its section model, or name the model "
            "instead of giving one"
        )
    return ModelSpec.model_validate(
        {
            "name": flag_of(loaded.name),
            "revision": loaded.revision,
            "dtype": dtype if dtype in ("float32", "bfloat16") else "auto",
            "device": str(device) if device.type == "cuda" else device.type,
        }
    )
