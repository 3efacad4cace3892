"""Frozen linear maps in training: forward and input gradient from copies in the kernels' layout.

    y = x W' + b        dx = dy W

Each product has a copy of its own, made when first needed (`swlora.kernels.packed_weight`), so maps
below the lowest adapted layer have one. Where the kernels do not serve a device or dtype, or
the copies would exceed their limit, the weight itself is used.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swlora.kernels.packed_weight import PackedWeight, linear, packed_weight
from swlora.models.anatomy import weight_out_in


class FrozenLinear:
    """The products of a frozen linear map, from packed copies of its weight where it `packs`."""

    def __init__(self, module: Any, *, packs: bool) -> None:
        self._modules = [module]
        self.weight = weight_out_in(module)
        self.bias: Tensor | None = module.bias
        self._packs = packs

    @cached_property
    def _packed(self) -> PackedWeight:
        return packed_weight(self._modules)

    @cached_property
    def _packed_transposed(self) -> PackedWeight:
        return packed_weight(self._modules, transposed=True)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W' + bias for x (N, in)."""
        if self._packs and x.dtype == self.weight.dtype:
            return linear(x, self._packed.of(self._modules), bias)
        return F.linear(x, self.weight, bias)

    def input_gradient(self, d_y: Tensor) -> Tensor:
        """Return dy W for dy (N, out)."""
        if self._packs and d_y.dtype == self.weight.dtype:
            return linear(d_y, self._packed_transposed.of(self._modules))
        return d_y @ self.weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in), with a graph where x has one."""
        return _frozen_linear(x, self)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: FrozenLinear) -> Tensor:
        ctx.frozen, ctx.shape = frozen, x.shape
        y = frozen.product(x.reshape(-1, x.shape[-1]), frozen.bias)
        return reshaped(y, x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_y = grads[0].reshape(-1, grads[0].shape[-1])
        return ctx.frozen.input_gradient(d_y).view(ctx.shape), None


_frozen_linear: Callable[..., Tensor] = _FrozenLinear.apply


def reshaped(y: Tensor, shape: torch.Size) -> Tensor:
    """(N, out) -> (..., out); no view for autograd: OLMo clamps its projections in place."""
    return torch.ops.aten._unsafe_view(y, [*shape[:-1], y.shape[1]])  # type: ignore[no-any-return]


def is_frozen(module: nn.Module) -> bool:
    """Say whether a module has no trained parameter of its own."""
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
