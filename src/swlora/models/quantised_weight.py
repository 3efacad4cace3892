"""Frozen weights that stay in the blocks of their .gguf file, and look like ordinary ones.

A `QuantisedWeight` is the weight of an ordinary nn.Linear, Conv1D or nn.Embedding: it has the shape
and dtype of the dequantised matrix and holds none of its numbers. An operation that is given one
gets the numbers for as long as it runs, so that transformers, PEFT and autograd need not know.
Looking up rows dequantises those alone; a weight saved for a backward pass is saved as it is.
Writing to one is refused, and so are views of it, through which it would be written.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from swlora.errors import UserError
from swlora.models.gguf_blocks import StoredMatrix


class QuantisedWeight(Tensor):
    """A matrix of a .gguf file as a weight (out, in), or (in, out) where it is transposed."""

    matrix: StoredMatrix
    is_transposed: bool

    @staticmethod
    def __new__(
        cls, matrix: StoredMatrix, dtype: torch.dtype, *, is_transposed: bool = False
    ) -> "QuantisedWeight":
        """Make the weight; it has no storage of its own."""
        n_out, n_in = matrix.shape
        shape, strides = ((n_in, n_out), (1, n_in)) if is_transposed else ((n_out, n_in), (n_in, 1))
        with torch.inference_mode(False):  # autograd gives what detach returns a version
            weight = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype)
        weight.matrix, weight.is_transposed = matrix, is_transposed
        return weight  # type: ignore[no-any-return]

    # Results are ordinary tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation: on the weight as it is where that is possible, else on its numbers."""
        kwargs = kwargs or {}
        if func in _ON_BLOCKS and isinstance(args[0], QuantisedWeight):
            result = _ON_BLOCKS[func](args[0], *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        parts = func.decompose(*args, **kwargs)  # inference mode leaves that to us
        if parts is not NotImplemented:
            return parts
        _refuse_aliases(func, args, kwargs)
        return func(*tree_map(numbers, args), **tree_map(numbers, kwargs))

    def dense(self) -> Tensor:
        """Return the numbers as an ordinary tensor of this shape and dtype."""
        numbers = self.matrix.dense(self.dtype)
        return numbers.t() if self.is_transposed else numbers

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return what it is; the numbers are not made for it."""
        return f"QuantisedWeight({tuple(self.shape)}, {self.dtype}, {self.matrix.kind.name})"


def numbers(value: Any) -> Any:
    """Return a QuantisedWeight as an ordinary tensor, dequantised; anything else as it is."""
    return value.dense() if isinstance(value, QuantisedWeight) else value


def is_quantised(module: nn.Module) -> bool:
    """Say whether the weight of a module stays in its blocks."""
    return isinstance(module._parameters.get("weight"), QuantisedWeight)


def has_quantised(model: nn.Module) -> bool:
    """Say whether any weight of a model stays in its blocks."""
    return any(isinstance(parameter, QuantisedWeight) for parameter in model.parameters())


def _refuse_aliases(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise UserError where an operation writes to a QuantisedWeight, or could with its result."""
    for place, argument in enumerate(func._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and isinstance(given, QuantisedWeight):
            raise UserError(
                "this is done to single weights of the model, and they stay as they lie in the "
                ".gguf file: give --frozen dequantised"
            )


def _same(weight: QuantisedWeight) -> QuantisedWeight:
    is_transposed = weight.is_transposed
    return QuantisedWeight(weight.matrix, weight.dtype, is_transposed=is_transposed)


def _turned(weight: QuantisedWeight) -> QuantisedWeight:
    return QuantisedWeight(weight.matrix, weight.dtype, is_transposed=not weight.is_transposed)


def _cast(weight: QuantisedWeight, **asked: Any) -> Any:
    """Return the weight in another dtype; an ordinary copy where more is asked for."""
    dtype = asked.get("dtype") or weight.dtype
    elsewhere = asked.get("device") not in (None, weight.device)
    if elsewhere or not dtype.is_floating_point:
        return NotImplemented
    return QuantisedWeight(weight.matrix, dtype, is_transposed=weight.is_transposed)


def _look_up(weight: QuantisedWeight, ids: Tensor, *_: Any) -> Any:
    """Return rows (..., in) by their ids, as nn.Embedding does; padding concerns gradients."""
    if weight.is_transposed:
        return NotImplemented
    return weight.matrix.rows(ids.reshape(-1), weight.dtype).view(*ids.shape, -1)


def _index(weight: QuantisedWeight, places: list[Tensor | None]) -> Any:
    """Return weight[ids] for ids of rows; NotImplemented for every other way of indexing."""
    if len(places) != 1 or places[0] is None or places[0].dtype != torch.int64:
        return NotImplemented
    return _look_up(weight, places[0])


_aten = torch.ops.aten
_ON_BLOCKS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.t.default: _turned,
    _aten._to_copy.default: _cast,
    _aten.embedding.default: _look_up,
    _aten.index.Tensor: _index,
}
