"""Weights read tensor by tensor from the files of a model, without making a model of them.

The tensors of safetensors files are views of the mapped files: a page is read when it is touched,
and can be given back (`release_pages`). Names are those of transformers' state dict, also where a
file leaves out the name of the backbone, as GPT-2's on the Hub does, or has another for the head.
What transformers puts together from several tensors (experts) keeps the names of the file. Buffers
that older versions of transformers saved, as Pythia's masks, are no weights: nothing reads them.
"""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from swlora.errors import UnknownFamilyError, UserError
from swlora.models.anatomy import family_of
from swlora.models.skeleton import make_skeleton

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 64_000_000
# Masks of attention, what it gives masked places (-inf in float16), and rotary frequencies
_BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", ".rotary_emb.inv_freq")


class WeightSource(Protocol):
    """The weights of a model, read when they are asked for."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the tensors; a tied head is not among them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in the file's own dtype; a GGUF's in float32.

        It may be a view of the file: not to be written to.
        """

    def shards(self) -> list[list[str]]:
        """Return the names by the file that they lie in."""


def open_weights(path: Path) -> WeightSource:
    """Open the weights in a folder (model.safetensors, or its index and shards) or a .gguf file.

    Raises UserError where there are none, or where they are damaged.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        from swlora.models.gguf_weights import GgufWeights

        return GgufWeights(path)
    return SafetensorsWeights(path)


class SafetensorsWeights:
    """The weights in the safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shards: list[list[str]] = []
        self._files: dict[str, Any] = {}  # by the name of the tensor
        self._stored: dict[str, str] = {}  # what a file calls the tensor
        files, naming = weight_files(folder), _Naming(folder)
        self.skeleton = naming.model  # what config.json describes; None for an unknown family
        with ExitStack() as opened:
            for file_name, expected in files.items():
                self._open(file_name, expected, naming, opened)
            opened.pop_all()  # mapped for as long as this object lives
        self.names: Sequence[str] = list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as a view of its file, in its own dtype."""
        tensor: Tensor = self._files[name].get_tensor(self._stored[name])
        return tensor

    def rows(self, name: str, rows: slice) -> Tensor:
        """Return some rows of a tensor, in its own dtype; no others are read."""
        part: Tensor = self._files[name].get_slice(self._stored[name])[rows]
        return part

    @property
    def n_numbers(self) -> int:
        """The numbers in all tensors together."""
        return sum(map(math.prod, self._shapes.values()))

    def stored_name(self, name: str) -> str:
        """Return what the file calls a tensor."""
        return self._stored[name]

    def shards(self) -> list[list[str]]:
        """Return the names by the file that they lie in."""
        return self._shards

    def _open(
        self, file_name: str, expected: set[str], naming: "_Naming", opened: ExitStack
    ) -> None:
        from safetensors import safe_open

        path = self._folder / file_name
        try:
            file = opened.enter_context(safe_open(path, "pt"))
            stored = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in stored}
        except Exception as error:  # of safetensors and torch, without a common kind
            detail = " ".join(str(error).split())[:200]
            raise UserError(f"{path} cannot be read as safetensors: {detail}") from error
        if missing := sorted(expected.difference(shapes)):
            raise UserError(f"{path} lacks {missing[0]}, which {INDEX} says is in it")
        named = [(naming.name(stored_name), stored_name) for stored_name in stored]
        weights = {name: stored_name for name, stored_name in named if naming.is_weight(name)}
        if twice := sorted(self._shapes.keys() & weights):
            raise UserError(f"{twice[0]} lies in two files of {self._folder}")
        self._shards.append(list(weights))
        for name, stored_name in weights.items():
            self._shapes[name], self._files[name] = shapes[stored_name], file
            self._stored[name] = stored_name


def weight_files(folder: Path) -> dict[str, set[str]]:
    """Return the names of the safetensors files of a model, and what an index says is in each.

    Raises UserError where there are none, or where an index names anything else than plain
    safetensors files beside it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}")
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return {SINGLE: set()}
    if not index.is_file():
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; other formats are not read")
    files: dict[str, set[str]] = {}
    for name, file_name in _weight_map(index).items():
        is_plain = isinstance(file_name, str) and Path(file_name).name == file_name
        if not is_plain or not file_name.endswith(".safetensors") or "\\" in file_name:
            raise UserError(f"{index} names {file_name!r}, which is no safetensors file beside it")
        files.setdefault(file_name, set()).add(name)
    for file_name in files:
        if not (folder / file_name).is_file():
            raise UserError(f"{folder} lacks {file_name}, which {INDEX} names")
    return files


def _weight_map(index: Path) -> dict[str, Any]:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(f"{index} is larger than {MAX_INDEX_BYTES:,} bytes: it is no index")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{index} is damaged: fetch the model again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} names no weights")
    return weight_map


class _Naming:
    """What transformers calls the tensors in the files of a model: it renames some as it loads."""

    def __init__(self, folder: Path) -> None:
        self.model = _skeleton(folder)
        if self.model is not None:
            self._known = self.model.state_dict()
            self._changes = get_model_conversion_mapping(self.model)

    def name(self, stored: str) -> str:
        """Return the name in the state dict; that of the file where several tensors make one."""
        if self.model is None or stored in self._known:
            return stored
        renamings = [c for c in self._changes if isinstance(c, WeightRenaming)]
        converters = [c for c in self._changes if isinstance(c, WeightConverter)]
        prefix = self.model.base_model_prefix
        name, part_of = rename_source_key(stored, renamings, converters, prefix, self._known)
        return str(name) if part_of is None and name in self._known else stored

    def is_weight(self, name: str) -> bool:
        """Say whether the model has a tensor of this name, or may: it is no buffer of old."""
        return self.model is None or name in self._known or not name.endswith(_BUFFERS)


def _skeleton(folder: Path) -> Any:
    """Return the model of a folder without content; None where its family is not known."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family_of(config.model_type)
    except (OSError, ValueError, UnknownFamilyError):
        return None
    return make_skeleton(config, str(folder))
