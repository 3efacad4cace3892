"""LoRA without casts and copies, on the modules that PEFT built.

    y = x W' + b + s (x A') B'        u = s dy B
    dx = dy W + u A     dA = u' x     dB = s dy' (x A')

Forward keeps x and the r-wide product x A'; the adapter's matrices are used in the model's dtype
and their gradients return in float32. PEFT's own forward stays in place for what this does not
cover (DoRA, several adapters at once).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from swlora.adapters.methods import adapted_modules
from swlora.engine.patching import patched_forwards


class _LoraLinear(torch.autograd.Function):
    """One linear map (weight as a view (out, in)) with its low-rank update."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_dropped: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        shape = x.shape
        x, x_dropped = x.reshape(-1, shape[-1]), x_dropped.reshape(-1, shape[-1])
        xa = F.linear(x_dropped, a_cast)
        y = F.linear(x, weight, bias)
        y.addmm_(xa, b_cast.t(), alpha=scale)
        ctx.save_for_backward(x_dropped, xa, weight, a_cast, b_cast)
        ctx.scale, ctx.shape, ctx.adapter_dtype = scale, shape, a.dtype
        # No view for autograd: a decoder may clamp its projections in place, as OLMo does.
        return torch.ops.aten._unsafe_view(y, [*shape[:-1], y.shape[1]])  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | float | None, ...]:
        x, xa, weight, a, b = ctx.saved_tensors
        d_y = grads[0].reshape(-1, weight.shape[0])
        u = (d_y @ b).mul_(ctx.scale)
        d_x = d_dropped = None
        if ctx.needs_input_grad[0]:
            d_x = d_y @ weight
            if not ctx.needs_input_grad[1]:
                d_x.addmm_(u, a)
            d_x = d_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            d_dropped = (u @ a).view(ctx.shape)
        d_a = (u.t() @ x).to(ctx.adapter_dtype)
        d_b = (d_y.t() @ xa).to(ctx.adapter_dtype).mul_(ctx.scale)
        return d_x, d_dropped, None, None, d_a, d_b, None


_lora_linear: Callable[..., Tensor] = _LoraLinear.apply


class _FastForward:
    """Replaces the forward of one PEFT LoRA layer."""

    def __init__(self, layer: Any) -> None:
        base = layer.base_layer
        name = layer.active_adapters[0]
        self.weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        self.bias = base.bias
        self.a: nn.Parameter = layer.lora_A[name].weight
        self.b: nn.Parameter = layer.lora_B[name].weight
        self.scale = float(layer.scaling[name])
        self.dropout = layer.lora_dropout[name]
        self.p = float(getattr(self.dropout, "p", 0.0))
        self._cast: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        drops = self.p > 0 and self.dropout.training
        if not torch.is_grad_enabled() and not drops:
            return self._without_graph(x)
        if drops:
            dropped = F.dropout(x, self.p)
            return _lora_linear(x, dropped, self.weight, self.bias, self.a, self.b, self.scale)
        return _lora_linear(x, x.detach(), self.weight, self.bias, self.a, self.b, self.scale)

    def _without_graph(self, x: Tensor) -> Tensor:
        """Generation calls this for every token: the adapter is scaled and cast only once."""
        if self._cast is None:
            b_scaled = (self.b * self.scale).t()
            self._cast = self.a.to(x.dtype), b_scaled.to(x.dtype).contiguous()
        a, b = self._cast
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, self.weight, self.bias).addmm_(F.linear(rows, a), b)
        return y.view(*x.shape[:-1], -1)


def is_covered(layer: Any) -> bool:
    """Say whether a PEFT layer is plain LoRA on a frozen linear map with one active adapter."""
    is_lora = isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)  # AdaLoRA has none
    if not is_lora or len(layer.active_adapters) != 1:
        return False
    if layer.merged or layer.disable_adapters:
        return False
    if any(parameter.requires_grad for parameter in layer.base_layer.parameters()):
        return False  # the fast backward has no gradient for them
    name = layer.active_adapters[0]
    variant = getattr(layer, "lora_variant", {}).get(name)
    is_linear = isinstance(layer.base_layer, nn.Linear | Conv1D)
    bias = getattr(layer.lora_B[name], "bias", None) if name in layer.lora_A else None
    return is_linear and variant is None and bias is None and name in layer.lora_A


@contextmanager
def fast_lora(model: Any) -> Iterator[None]:
    """Use the fast forward in every covered layer of a PeftModel while the body runs.

    A model without adapters has no such layer and runs as it is.
    """
    layers = [layer for layer in adapted_modules(model).values() if is_covered(layer)]
    with patched_forwards({layer: _FastForward(layer) for layer in layers}):
        yield
