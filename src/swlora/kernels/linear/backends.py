"""How the products of linear maps are computed: a class for each way, tables of which goes first.

    product          y = x W' + b        x (N, in), W (out, in) the maps' weights, stacked along out
    input_gradient  dx = dy W           dy (N, out)

A further way, for another device or for quantised weights, is one more class and its place in a
table. Each gives way to torch's own product for an input that it does not serve.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swlora.kernels.linear.packed_weight import (
    PackedWeight,
    laid_out,
    linear,
    packed_weight,
    serves,
)
from swlora.models.anatomy import weight_out_in
from swlora.models.linear_maps import MAPS, has_own_weight, is_linear_map
from swlora.models.quantised_weight import is_quantised, numbers
from swlora.models.sharded_weight import is_sharded, whole


class TorchProducts:
    """Products by torch, from the weights as they are; every linear map has them.

    `maps` are the linear maps of one input.
    """

    def __init__(self, maps: Sequence[Any]) -> None:
        self.maps = maps

    @classmethod
    def takes(cls, module: Any) -> bool:
        """Say whether this backend computes the map that a module is, in its present state."""
        return is_linear_map(module)

    @property
    def weight(self) -> Tensor:
        """The weights (out, in), stacked; a view where there is one map only."""
        weights = [weight_out_in(module) for module in self.maps]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    @property
    def n_out(self) -> int:
        """The number of output channels of all maps."""
        return sum(len(weight_out_in(module)) for module in self.maps)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W' + bias, (N, out)."""
        return F.linear(x, self.weight, bias)

    def input_gradient(self, d_y: Tensor) -> Tensor:
        """Return dy W, (N, in)."""
        return d_y @ self.weight

    @property
    def copy_bytes(self) -> int:
        """The bytes of a copy of the weights, one for each direction; 0 where none is made."""
        return 0

    def refresh(self) -> None:
        """Follow weights that were written through `.data`; other writes are followed anyway."""

    def held(self) -> AbstractContextManager[None]:
        """Keep what several products in the body need of the weights; here, nothing is made."""
        return nullcontext()


class OneDnnProducts(TorchProducts):
    """Float32 products on a CPU by oneDNN instead of the BLAS that torch was built with.

    torch hands a float32 product to its BLAS (MKL), which is slow on processors of other makers;
    oneDNN, which is in the same build and serves bf16, is not. Same arithmetic, other order of
    summation. Weights are read at every call, so there are no copies.
    """

    @classmethod
    def takes(cls, module: Any) -> bool:
        """Say whether the module is a linear map in float32 on a CPU, and oneDNN is there."""
        if not (_has_onednn and _is_plain(module)):
            return False
        weight: Tensor = module.weight
        return weight.dtype == torch.float32 and weight.device.type == "cpu"

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W' + bias, (N, out)."""
        if x.dtype != torch.float32:
            return super().product(x, bias)
        return linear(x, self.weight, bias)


class PackedProducts(TorchProducts):
    """Products by oneDNN from copies of the weights in its own layout, one for each direction.

    A copy is made when it is first needed, so maps below the lowest adapted layer have one. Where
    it finds no room under the limit then, the weights themselves are used from there on.
    """

    def __init__(self, maps: Sequence[Any]) -> None:
        super().__init__(maps)
        self._dtype: torch.dtype = maps[0].weight.dtype  # one that the kernels serve
        self._copies: dict[bool, PackedWeight | None] = {}  # by `transposed`; None: no room

    @classmethod
    def takes(cls, module: Any) -> bool:
        """Say whether the kernels take the weight and bias of a module."""
        if not _is_plain(module):
            return False
        weight, bias = module.weight, module.bias
        if weight.device.type != "cpu" or (bias is not None and bias.dtype != weight.dtype):
            return False
        return serves(weight.dtype)

    def reserve(self, *, backward: bool = False) -> bool:
        """Take room for the forward's copy now, for both with `backward`; say if there was any."""
        directions = (False, True) if backward else (False,)
        return all([self._copy(transposed) is not None for transposed in directions])

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W' + bias, (N, out)."""
        packed = self._copy(transposed=False) if self._serves(x) else None
        return super().product(x, bias) if packed is None else linear(x, packed.tensor(), bias)

    def input_gradient(self, d_y: Tensor) -> Tensor:
        """Return dy W, (N, in)."""
        packed = self._copy(transposed=True) if self._serves(d_y) else None
        return super().input_gradient(d_y) if packed is None else linear(d_y, packed.tensor())

    @property
    def copy_bytes(self) -> int:
        """The bytes of one copy."""
        return sum(m.weight.nbytes for m in self.maps)

    def refresh(self) -> None:
        """Drop copies whose weights were written through `.data`."""
        for packed in self._copies.values():
            if packed is not None:
                packed.check()

    def _serves(self, rows: Tensor) -> bool:
        return bool(rows.dtype == self._dtype == self.maps[0].weight.dtype)

    def _copy(self, transposed: bool) -> PackedWeight | None:
        if transposed not in self._copies:
            self._copies[transposed] = packed_weight(self.maps, transposed=transposed)
        return self._copies[transposed]


class QuantisedProducts(TorchProducts):
    """Products with weights that stay in the blocks of a .gguf file, by oneDNN where it serves.

    The matrix is dequantised whole for each product: cut into pieces, dy W would be summed in
    another order. oneDNN lays it out as `PackedProducts` does, so the bits are the same. While
    `held`, the matrix is dequantised once.
    """

    def __init__(self, maps: Sequence[Any]) -> None:
        super().__init__(maps)
        self._held: Tensor | None = None

    @classmethod
    def takes(cls, module: Any) -> bool:
        """Say whether the module's weight stays in its blocks."""
        return type(module) in MAPS and is_quantised(module)

    @property
    def weight(self) -> Tensor:
        """The weights (out, in), stacked, dequantised."""
        if self._held is not None:
            return self._held
        weights = [self._whole(weight_out_in(module)) for module in self.maps]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the dequantised matrix while the body runs: it is needed several times."""
        self._held = self.weight
        try:
            yield
        finally:
            self._held = None

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W' + bias, (N, out)."""
        if not self._serves(x):
            return super().product(x, bias)
        weight = self.weight
        if len(x) == 1 and x.dtype == torch.float32:  # a plain weight gets another kernel there
            weight = laid_out(weight)
        return linear(x, weight, bias)

    def input_gradient(self, d_y: Tensor) -> Tensor:
        """Return dy W, (N, in)."""
        if not self._serves(d_y):
            return super().input_gradient(d_y)
        return linear(d_y, self.weight.t())

    def _serves(self, rows: Tensor) -> bool:
        return serves(rows.dtype) and bool(rows.dtype == self.maps[0].weight.dtype)

    def _whole(self, weight: Tensor) -> Tensor:
        return numbers(weight)  # type: ignore[no-any-return]


class ShardedProducts(QuantisedProducts):
    """Products with weights that are divided over processes: those of a block are whole while it
    runs, a head's is gathered for each product, or once while `held`.
    """

    @classmethod
    def takes(cls, module: Any) -> bool:
        """Say whether the module's weight is divided."""
        return type(module) in MAPS and is_sharded(module.weight)

    def _serves(self, rows: Tensor) -> bool:
        return rows.device.type == "cpu" and super()._serves(rows)

    def _whole(self, weight: Tensor) -> Tensor:
        return whole(weight)


def _is_plain(module: Any) -> bool:
    return type(module) in MAPS and not is_quantised(module) and has_own_weight(module)


_has_onednn = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)

Table = tuple[type[TorchProducts], ...]
# The first is for many calls.
WITH_COPIES: Table = (ShardedProducts, QuantisedProducts, PackedProducts, TorchProducts)
WITHOUT_COPIES: Table = (ShardedProducts, QuantisedProducts, OneDnnProducts, TorchProducts)


def backend_of(module: nn.Module, table: Table) -> TorchProducts:
    """Return the products of a linear map by the first backend of the table that takes it."""
    return next(backend for backend in table if backend.takes(module))([module])


def select_fast(modules: Iterable[nn.Module], table: Table) -> list[nn.Module]:
    """Return the modules that a faster backend than torch's own takes."""
    return [m for m in modules if any(backend.takes(m) for backend in table[:-1])]


def forwards_without_copies(model: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Return the fast forward of every Linear and Conv1D, by weights that are read at each call.

    For inference only: there is no gradient.
    """
    maps = select_fast(model.modules(), WITHOUT_COPIES)
    return {module: _without_gradient(module) for module in maps}


def _without_gradient(module: Any) -> Callable[[Tensor], Tensor]:
    backend = backend_of(module, WITHOUT_COPIES)

    def forward(x: Tensor) -> Tensor:
        y = backend.product(x.reshape(-1, x.shape[-1]), module.bias)
        return y.view(*x.shape[:-1], -1)

    return forward
