"""Frozen weights in the blocks that oneDNN's kernels read, laid out once.

Given a plain weight, oneDNN lays it out anew at every call: half of the time of a product with one
row, a fifth with 64, a twentieth with 800. A copy follows its weights: where one of them has
changed, it is made again. Copies of the same weights in the same direction are shared by all who
ask, live as long as one of them holds the copy, and are counted once against the one limit.

    linear(x, copy, b) = x W' + b        W the stacked weights, or with `transposed` their transpose
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from swlora.memory import copies_limit_bytes
from swlora.models.anatomy import weight_out_in

SAMPLE = 64  # numbers of a weight that are compared


class PackedWeight:
    """Weights (out, in) of one input, stacked along out, in the layout of the kernels.

    `n_bytes` is what it takes, or will take once it is asked for.
    """

    def __init__(self, modules: Sequence[nn.Module], *, transposed: bool) -> None:
        self._modules, self._transposed = tuple(modules), transposed  # held, so ids stay theirs
        self._packed: Tensor | None = None
        self._state: list[tuple[int, int]] = []
        self._sample: list[Tensor] = []
        self.n_bytes = self._weight_bytes()

    def tensor(self) -> Tensor:
        """Return the modules' weights as they are now, laid out anew where one has changed."""
        weights: list[Any] = [m._parameters["weight"] for m in self._modules]
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        if state != self._state:
            plain = torch.cat([weight_out_in(m) for m in self._modules])
            self._packed = laid_out(plain.t() if self._transposed else plain)
            self._state, self._sample = state, _sample(self._modules)
            self.n_bytes = self._weight_bytes()
        assert self._packed is not None
        return self._packed

    def check(self) -> None:
        """Drop the copy if the weights were written through `.data`, as PEFT does to merge.

        Such a write leaves no trace on the tensor. A sample of the numbers shows it where it
        changes them all, beyond rounding, as merging does.
        """
        if self._state and not all(map(torch.equal, self._sample, _sample(self._modules))):
            self._state = []

    def _weight_bytes(self) -> int:
        return sum(module.get_parameter("weight").nbytes for module in self._modules)


def _sample(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return some numbers of each weight, spread over all of it."""
    weights = (module.get_parameter("weight").detach().flatten() for module in modules)
    return [weight[:: 1 + len(weight) // SAMPLE].clone() for weight in weights]


# By direction and the modules' ids. Weak: whoever computes with a copy holds it.
_HELD: WeakValueDictionary[tuple[bool, tuple[int, ...]], PackedWeight] = WeakValueDictionary()


def packed_weight(modules: Sequence[nn.Module], *, transposed: bool = False) -> PackedWeight | None:
    """Return the copy of these modules' weights that everybody shares, checked.

    None where a new one would exceed the limit together with all that are held: what does not fit
    is computed from the weights themselves.
    """
    key = transposed, tuple(map(id, modules))
    packed = _HELD.get(key)
    if packed is None:
        packed = PackedWeight(modules, transposed=transposed)
        if held_bytes() + packed.n_bytes > copies_limit_bytes():
            return None
        _HELD[key] = packed
    packed.check()
    return packed


def held_bytes() -> int:
    """Return what all copies in the process take together."""
    return sum(packed.n_bytes for packed in list(_HELD.values()))


def serves(dtype: torch.dtype) -> bool:
    """Say whether oneDNN's kernels compute in a dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def laid_out(weight: Tensor) -> Tensor:
    """Return a copy of a weight (out, in), of any strides, in the layout of the kernels."""
    # The number of rows is a hint that makes no difference (measured for 1 to 512).
    return torch.ops.mkldnn._reorder_linear_weight(weight, 64)  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W' + b by oneDNN for x (N, in) and a weight (out, in), packed or plain."""
    return torch.ops.mkldnn._linear_pointwise.default(  # type: ignore[no-any-return]
        x.contiguous(), weight, bias, "none", [], ""
    )
