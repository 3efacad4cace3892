"""Frozen weights in the blocks that oneDNN's kernels read, laid out once.

Given a plain weight, oneDNN lays it out anew at every call: half of the time of a product with one
row, a fifth with 64, a twentieth with 800. A copy follows its weights: where one of them has
changed, it is made again. Copies of the same weights in the same direction are shared by all who
ask, and live as long as the module.

    linear(x, copy, b) = x W' + b        W the stacked weights, or with `transposed` their transpose
"""

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swlora.models.anatomy import weight_out_in

PACK_LIMIT_BYTES = 2 << 30  # of copies for one use; what does not fit runs from its own weights
SAMPLE = 64  # numbers of a weight that are compared
MAPS = (nn.Linear, Conv1D)  # exactly these: a subclass may compute something else


class PackedWeight:
    """Weights (out, in) of one input, stacked along out, in the layout of the kernels."""

    def __init__(self, *, transposed: bool = False) -> None:
        self._transposed = transposed
        self._packed: Tensor | None = None
        self._state: list[tuple[int, int]] = []
        self._sample: list[Tensor] = []

    def of(self, modules: Sequence[nn.Module]) -> Tensor:
        """Return the modules' weights as they are now, laid out anew where one has changed."""
        weights: list[Any] = [m._parameters["weight"] for m in modules]
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        if state != self._state:
            plain = torch.cat([weight_out_in(m) for m in modules])
            plain = (plain.t() if self._transposed else plain).contiguous()
            # The number of rows is a hint that makes no difference (measured for 1 to 512).
            self._packed = torch.ops.mkldnn._reorder_linear_weight(plain, 64)
            self._state, self._sample = state, _sample(modules)
        assert self._packed is not None
        return self._packed

    def check(self, modules: Sequence[nn.Module]) -> None:
        """Drop the copy if the weights were written through `.data`, as PEFT does to merge.

        Such a write leaves no trace on the tensor. A sample of the numbers shows it where it
        changes them all, beyond rounding, as merging does.
        """
        if self._state and not all(map(torch.equal, self._sample, _sample(modules))):
            self._state = []


def _sample(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return some numbers of each weight, spread over all of it."""
    weights = (module.get_parameter("weight").detach().flatten() for module in modules)
    return [weight[:: 1 + len(weight) // SAMPLE].clone() for weight in weights]


_PACKED: WeakKeyDictionary[nn.Module, dict[tuple[int, bool], PackedWeight]] = WeakKeyDictionary()


def packed_weight(modules: Sequence[nn.Module], *, transposed: bool = False) -> PackedWeight:
    """Return the copy of these modules' weights that everybody shares, checked."""
    own = _PACKED.setdefault(modules[0], {})
    packed = own.setdefault((len(modules), transposed), PackedWeight(transposed=transposed))
    packed.check(modules)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W' + b for x (N, in) and a packed weight (out, in)."""
    return torch.ops.mkldnn._linear_pointwise.default(  # type: ignore[no-any-return]
        x.contiguous(), packed, bias, "none", [], ""
    )


def packable(modules: Iterable[nn.Module], *, copies: int = 1) -> set[nn.Module]:
    """Return those whose weights the kernels take, until their copies reach PACK_LIMIT_BYTES."""
    chosen, n_bytes = set(), 0
    for module in modules:
        if is_packable(module):
            n_bytes += copies * sum(parameter.nbytes for parameter in module.parameters())
            if n_bytes <= PACK_LIMIT_BYTES:
                chosen.add(module)
    return chosen


def is_packable(module: Any) -> bool:
    """Say whether the kernels take the weight and bias of a module."""
    if type(module) not in MAPS or not torch.backends.mkldnn.is_available():
        return False
    weight, bias = module.weight, module.bias
    if weight.device.type != "cpu" or (bias is not None and bias.dtype != weight.dtype):
        return False
    has_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_bf16)
