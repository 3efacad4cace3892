"""Frozen linear maps in training: forward and input gradient, without a gradient of the weight.

y = x W' + b        dx = dy W
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from swlora.kernels.first_order import first_order
from swlora.kernels.linear.backends import WITH_COPIES, PackedProducts, backend_of, select_fast


class FrozenLinear:
    """The forward of a frozen linear map; the copies of its weight go with this object."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._backend = backend_of(module, WITH_COPIES)
        self.product = self._backend.product
        self.input_gradient = self._backend.input_gradient

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), a view."""
        return self._backend.weight

    @property
    def n_out(self) -> int:
        """The number of output channels."""
        return self._backend.n_out

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,); None where there is none."""
        return self._module.bias  # type: ignore[no-any-return]

    @property
    def copy_bytes(self) -> int:
        """The bytes of a copy of its weight in the kernels' layout; 0 where none is made."""
        return self._backend.copy_bytes

    def reserve(self) -> None:
        """Take the room of both copies now, before others do."""
        if isinstance(self._backend, PackedProducts):
            self._backend.reserve(backward=True)

    def held(self) -> AbstractContextManager[None]:
        """Keep what several products in the body need of the weight."""
        return self._backend.held()

    def refresh(self) -> None:
        """Follow a weight that was written through `.data`."""
        self._backend.refresh()

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
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_y = grads[0].reshape(-1, grads[0].shape[-1])
        return ctx.frozen.input_gradient(d_y).view(ctx.shape), None


_frozen_linear: Callable[..., Tensor] = _FrozenLinear.apply


def reshaped(y: Tensor, shape: torch.Size) -> Tensor:
    """(N, out) -> (..., out); no view for autograd: OLMo clamps its projections in place."""
    return torch.ops.aten._unsafe_view(y, [*shape[:-1], y.shape[1]])  # type: ignore[no-any-return]


def frozen_forwards(model: nn.Module) -> dict[nn.Module, FrozenLinear]:
    """Return the forward of every frozen linear map that is computed faster than torch does."""
    return {
        m: FrozenLinear(m) for m in select_fast(filter(is_frozen, model.modules()), WITH_COPIES)
    }


def is_frozen(module: nn.Module) -> bool:
    """Say whether a module has no trained parameter of its own."""
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
