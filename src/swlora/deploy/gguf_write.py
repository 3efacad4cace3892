"""A model as a GGUF file, written tensor by tensor: complete, or not there."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swlora.deploy.export_request import TypeName
from swlora.deploy.gguf_hyperparameters import extra_tensors, write_hyperparameters
from swlora.deploy.gguf_layout import GgufLayout, Place
from swlora.deploy.gguf_texts import name_in_file
from swlora.deploy.gguf_tokenizer import write_tokenizer
from swlora.deploy.gguf_types import FILE_TYPES, encoded, tensor_type
from swlora.errors import UserError
from swlora.models.end_tokens import find_end_tokens
from swlora.models.gguf_config import MISREAD_NAME
from swlora.models.gguf_header import read_gguf_table
from swlora.models.gguf_reading import read_once
from swlora.models.weight_source import WeightSource
from swlora.progress import Task

# Fields of a base file that are of its tensors, or that the writer adds itself
_OWN_FIELDS = ("GGUF.", "general.architecture", "general.file_type", "split.", "quantize.")
QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class ModelParts:
    """What a GGUF file is made of: configuration and tokenizer of transformers, and weights.

    `base` is a GGUF file whose metadata is taken as it is; without one it is made. `for_chats` says
    whether the model is given chats, where its tokenizer has a template.
    """

    config: Any
    tokenizer: Any
    weights: WeightSource
    generation_config: Any = None
    base: Path | None = None
    for_chats: bool = True


@dataclass(frozen=True)
class _Piece:
    """A tensor of the file: the model's tensors that it is made of, each with its place."""

    name: str
    shape: tuple[int, ...]
    sources: list[tuple[str, Place]]


def write_gguf(parts: ModelParts, path: Path, kind: TypeName, name: str, task: Task) -> None:
    """Write a model to `path`, its matrices in the type `kind`; `task` advances by the tensor.

    Raises UserError for what llama.cpp has no place for, and OSError where the disk is full.
    """
    import gguf

    layout = GgufLayout(parts.config)
    pieces = list(_pieces(layout, parts.weights))
    writer = gguf.GGUFWriter(path, layout.family.arch)
    try:
        if parts.base is None:
            _write_metadata(writer, parts, name)
            extra = extra_tensors(parts.config)
        else:
            _check_base(parts.base, layout.family.arch, {p.name: p.shape for p in pieces})
            with read_once():
                _copy_metadata(writer, parts.base)
                extra = _factors_of(parts.base)
        writer.add_file_type(FILE_TYPES[kind])
        types = {p.name: tensor_type(p.name, p.shape, kind) for p in pieces}
        for piece in pieces:
            _announce(writer, piece.name, piece.shape, types[piece.name])
        for extra_name, tensor in extra.items():
            _announce(writer, extra_name, tuple(tensor.shape), "f32")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece in pieces:
            tensor = _put_together(piece, parts.weights)
            writer.write_tensor_data(encoded(piece.name, tensor, types[piece.name]))
            task.advance()
        for extra_name, tensor in extra.items():
            writer.write_tensor_data(encoded(extra_name, tensor, "f32"))
    finally:
        writer.close()


def n_tensors(parts: ModelParts) -> int:
    """Return how many tensors the file gets."""
    return len(list(_pieces(GgufLayout(parts.config), parts.weights)))


def tensor_bytes(parts: ModelParts, kind: TypeName) -> int:
    """Return the bytes that all tensors of the file take together."""
    pieces = _pieces(GgufLayout(parts.config), parts.weights)
    return sum(_n_bytes(p.shape, tensor_type(p.name, p.shape, kind)) for p in pieces)


def _pieces(layout: GgufLayout, weights: WeightSource) -> Iterator[_Piece]:
    """Yield the file's tensors in the order of the model's; experts are stacked to one."""
    sources: dict[str, list[tuple[str, Place]]] = {}
    for name in weights.names:
        if not layout.is_left_out(name):
            place = layout.place(name)
            sources.setdefault(place.name, []).append((name, place))
    for name, found in sources.items():
        found.sort(key=lambda source: source[1].expert or 0)
        first_name, place = found[0]
        shape = weights.shape(first_name)
        if place.is_transposed and len(shape) == 2:
            shape = (shape[1], shape[0])
        if place.expert is not None:
            shape = (len(found), *shape)
        elif len(found) > 1:
            raise UserError(f"{first_name} and {found[1][0]} would both be {name}")
        yield _Piece(name, shape, found)


def _put_together(piece: _Piece, weights: WeightSource) -> Tensor:
    arranged = [place.arranged(weights.tensor(name).float()) for name, place in piece.sources]
    return torch.stack(arranged) if piece.sources[0][1].expert is not None else arranged[0]


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: TypeName) -> None:
    import gguf

    dtype = torch.empty(0).numpy().dtype  # not looked at beside the type
    raw = gguf.GGMLQuantizationType[kind.upper()]
    writer.add_tensor_info(name, shape, dtype, _n_bytes(shape, kind), raw)


def _n_bytes(shape: tuple[int, ...], kind: TypeName) -> int:
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return int(math.prod(shape)) * int(block_bytes) // int(block)


def _write_metadata(writer: Any, parts: ModelParts, name: str) -> None:
    writer.add_type("model")
    name = name_in_file(parts.tokenizer, name)
    writer.add_name(name.capitalize() if name == MISREAD_NAME else name)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    write_hyperparameters(writer, parts.config)
    write_tokenizer(
        writer,
        parts.tokenizer,
        parts.config.vocab_size,
        _end_tokens(parts),
        for_chats=parts.for_chats,
    )


def _end_tokens(parts: ModelParts) -> tuple[int, ...]:
    """Return the ids of all tokens that end a text, without a model at hand."""

    class _Known:
        config = parts.config

        @staticmethod
        def get_input_embeddings() -> Any:
            return torch.nn.Embedding(parts.config.vocab_size, 1, device="meta")

    return find_end_tokens(_Known(), parts.tokenizer, parts.generation_config)


def _check_base(base: Path, arch: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError where a base file is of another model than the weights."""
    header = read_gguf_table(base)
    if header.architecture != arch:
        raise UserError(f"{base} is no {arch} model, as the weights are")
    for name, shape in shapes.items():
        stored = header.tensors.get(name)
        if stored is None and name != "output.weight":  # a head that is no longer tied
            raise UserError(f"{base} belongs to another model: it has no {name}")
        if stored is not None and stored.shape != shape:
            raise UserError(
                f"{base} belongs to another model: {name} has the shape {list(stored.shape)} there "
                f"and {list(shape)} here"
            )


@read_once()
def copied_fields(path: Path) -> dict[str, tuple[Any, Any, Any]]:
    """Return what a file says of its model and tokenizer: (value, type, type of an array's items).

    What it says of its own tensors, and how they were quantised, is left out, and so are empty
    arrays, which `gguf` does not write.
    """
    import gguf

    found = {}
    for key, stored in gguf.GGUFReader(path).fields.items():
        sub_type = stored.types[-1] if len(stored.types) > 1 else None
        is_empty = stored.types[0] == gguf.GGUFValueType.ARRAY and sub_type is None
        if not key.startswith(_OWN_FIELDS) and not is_empty:
            found[key] = (stored.contents(), stored.types[0], sub_type)
    return found


def _copy_metadata(writer: Any, base: Path) -> None:
    for key, (value, kind, sub_type) in copied_fields(base).items():
        writer.add_key_value(key, value, kind, sub_type)


def _factors_of(base: Path) -> dict[str, Tensor]:
    """Return the tensors of a base file that no weight of the model is."""
    import gguf

    return {
        tensor.name: torch.from_numpy(tensor.data.copy())
        for tensor in gguf.GGUFReader(base).tensors
        if tensor.name.startswith(("rope_freqs.", "rope_factors_"))
    }
