"""Norms and gated activations with one hand-written backward each, instead of a chain of casts.

    RMSNorm  y = w x / rms(x)        dx = r (w dy) - x r^3 mean(x w dy),  r = 1 / rms(x)
    SwiGLU   h = silu(g) u           dg = dh u silu'(g),  du = dh silu(g)

Arithmetic is float32 inside, in the model's dtype outside, as in transformers; frozen weights get
no gradient. Other norms and MLPs keep their own forward.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swlora.kernels.first_order import first_order
from swlora.kernels.linear.frozen import is_frozen
from swlora.kernels.recomputed import made_by
from swlora.kernels.wide import wide, wide_dtype
from swlora.models.anatomy import SwigluMaps, rms_norm_epsilon, swiglu_maps
from swlora.models.linear_maps import is_linear_map


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        scaled = wide(grads[0] * weight)
        normed = wide(x) * r
        projection = (scaled * normed).mean(-1, keepdim=True)
        return scaled.sub_(normed * projection).mul_(r).to(x.dtype), None, None


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and r, (..., 1) float32."""
    x_wide = wide(x)
    r = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True).add_(eps))
    return (x_wide * r).to(x.dtype).mul_(weight), r


def _normed_for_inference(x: Tensor, eps: float) -> Tensor:
    """Return x / rms(x), rounded once; a single row on a CPU by two operators instead of eight."""
    width = x.shape[-1]
    if x.numel() == width and x.device.type == "cpu":
        norm = torch.linalg.vector_norm(x, dtype=wide_dtype(x.dtype)).item()
        return x.mul(1 / math.sqrt(norm * norm / width + eps))
    return F.rms_norm(x, (width,), None, eps)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return d_gate, F.silu(gate).mul_(grads[0])


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) up."""
    return F.silu(gate).mul_(up)


_rms_norm: Callable[..., Tensor] = _RmsNorm.apply
_silu_mul: Callable[..., Tensor] = _SiluMul.apply


class _FastRmsNorm:
    def __init__(self, module: Any, eps: float) -> None:
        self._module, self._eps = module, eps

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight: Tensor = self._module.weight
        if torch.is_grad_enabled():
            y = _rms_norm(hidden_states, weight, self._eps)
            x = hidden_states.detach()
            return made_by(y, lambda: _normed(x, weight, self._eps)[0])
        return _normed_for_inference(hidden_states, self._eps).mul_(weight)  # rounded before, too


class _FastSwiglu:
    def __init__(self, maps: SwigluMaps) -> None:
        self._maps = maps

    def __call__(self, x: Tensor) -> Tensor:
        maps = self._maps
        gate, up = maps.gate(x), maps.up(x)
        if not torch.is_grad_enabled():
            return maps.down(gated(gate, up))  # type: ignore[no-any-return]
        h = _silu_mul(gate, up)
        gate, up = gate.detach(), up.detach()
        return maps.down(made_by(h, lambda: gated(gate, up)))  # type: ignore[no-any-return]


class _ContiguousLinear:
    """A head that copies the few rows it is given, not its weight.

    generate() hands the head a slice of the prompt's states; torch turns the product with such a
    strided batch into one with a copy of the weight for every row.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.contiguous(), self.module.weight, self.module.bias)


def fused_forwards(model: Any) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Return the fused forward of every norm and MLP of a known kind, and that of a plain head."""
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for module in model.modules():
        if (eps := rms_norm_epsilon(module)) is not None and is_frozen(module):
            forwards[module] = _FastRmsNorm(module, eps)
        elif maps := swiglu_maps(module):
            forwards[module] = _FastSwiglu(maps)
    head = model.get_output_embeddings()
    if is_linear_map(head):  # not an adapter around it
        forwards[head] = _ContiguousLinear(head)
    return forwards
