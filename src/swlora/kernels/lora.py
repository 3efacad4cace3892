"""LoRA without casts and copies, on the modules that PEFT built.

    y = x W' + b + s (x A') B'        u = s dy B
    dx = dy W + u A     dA = u' x     dB = s dy' (x A')

Forward keeps x and the r-wide product x A'; the adapter's matrices are used in the model's dtype
and their gradients return in float32. Products with frozen weights, adapted or not, use copies in
the kernels' own layout. LoRA+, rsLoRA and PiSSA are this with other numbers; AdaLoRA has diag(e) A
in the place of A. DoRA scales y, before the bias, by m / ||W + s B A||, one number an output
channel, whose norm is a constant to the gradient (arXiv 2402.09353, section 4.3).
PEFT's own forward stays in place for what this does not cover (several adapters at once).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from swlora.adapters.methods import adapted_modules
from swlora.kernels.frozen_linear import FrozenLinear, is_frozen, reshaped
from swlora.kernels.packed_weight import packable
from swlora.kernels.patched_forwards import patched_forwards


class _LoraLinear(torch.autograd.Function):
    """One linear map with its low-rank update."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_dropped: Tensor,
        frozen: FrozenLinear,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        shape = x.shape
        x, x_dropped = x.reshape(-1, shape[-1]), x_dropped.reshape(-1, shape[-1])
        xa = F.linear(x_dropped, a_cast)
        y = frozen.product(x, bias)
        y.addmm_(xa, b_cast.t(), alpha=scale)
        ctx.save_for_backward(x_dropped, xa, a_cast, b_cast)
        ctx.frozen, ctx.scale, ctx.shape, ctx.adapter_dtype = frozen, scale, shape, a.dtype
        return reshaped(y, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | float | None, ...]:
        x, xa, a, b = ctx.saved_tensors
        d_y = grads[0].reshape(-1, b.shape[0])
        u = (d_y @ b).mul_(ctx.scale)
        d_x = d_dropped = None
        if ctx.needs_input_grad[0]:
            d_x = ctx.frozen.input_gradient(d_y)
            if not ctx.needs_input_grad[1]:
                d_x.addmm_(u, a)
            d_x = d_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            d_dropped = (u @ a).view(ctx.shape)
        d_a = (u.t() @ x).to(ctx.adapter_dtype)
        d_b = (d_y.t() @ xa).to(ctx.adapter_dtype).mul_(ctx.scale)
        return d_x, d_dropped, None, None, d_a, d_b, None


_lora_linear: Callable[..., Tensor] = _LoraLinear.apply


class FastLora:
    """Replaces the forward of one PEFT LoRA layer."""

    def __init__(self, layer: Any, *, packs: bool) -> None:
        name = layer.active_adapters[0]
        self._frozen = FrozenLinear(layer.base_layer, packs=packs)
        self.scale = float(layer.scaling[name])
        self.dropout = layer.lora_dropout[name]
        self.p = float(getattr(self.dropout, "p", 0.0))
        self._matrices = layer.lora_A[name], layer.lora_B[name]
        self._cast: tuple[Tensor, Tensor] | None = None

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r), with a graph where gradients are on."""
        a, b = self._matrices
        return a.weight, b.weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in)."""
        return self.product(x, self._frozen.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x (W + s B A)' + bias, with the adapter's dropout where it is on."""
        drops = self.p > 0 and self.dropout.training
        if not torch.is_grad_enabled() and not drops:
            return self._without_graph(x, bias)
        x_dropped = F.dropout(x, self.p) if drops else x.detach()
        return _lora_linear(x, x_dropped, self._frozen, bias, *self.matrices(), self.scale)

    def _without_graph(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Generation calls this for every token: the adapter is scaled and cast only once."""
        if self._cast is None:
            a, b = self.matrices()
            self._cast = a.to(x.dtype), (b * self.scale).t().to(x.dtype).contiguous()
        a, b = self._cast
        rows = x.reshape(-1, x.shape[-1])
        y = self._frozen.product(rows, bias).addmm_(F.linear(rows, a), b)
        return y.view(*x.shape[:-1], -1)


class _FastAdaLora(FastLora):
    """y = x W' + b + s / r0 (x (diag(e) A)') B', with r0 the rank it started with."""

    def __init__(self, layer: Any, *, packs: bool) -> None:
        super().__init__(layer, packs=packs)
        name = layer.active_adapters[0]
        self._singular_values = layer.lora_E[name]
        self.scale /= float(layer.ranknum[name].detach()) + 1e-5  # as PEFT does

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return diag(e) A and B."""
        a, b = self._matrices
        return a * self._singular_values, b


class FastDora(FastLora):
    """y = c (x W' + s (x A') B') + b with c = m / ||W + s B A||, (out,), in float32."""

    def __init__(self, layer: Any, *, packs: bool) -> None:
        super().__init__(layer, packs=packs)
        self._magnitude: nn.Parameter = layer.lora_magnitude_vector[layer.active_adapters[0]].weight
        self._norm: Tensor | None = None  # constant while the forward is in place: one step

    def __call__(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in)."""
        if self._norm is None:
            self._norm = self._channel_norms()
        y = self.product(x, None) * (self._magnitude / self._norm)
        bias = self._frozen.bias
        return (y if bias is None else y + bias).to(x.dtype)

    @torch.no_grad()
    def _channel_norms(self) -> Tensor:
        """Return the norms of the rows of W + s B A, (out,), from products that are r wide.

        ||w + s A' b||^2 = ||w||^2 + 2 s b (A w) + s^2 b A A' b'
        """
        a, b = self.matrices()
        weight = self._frozen.weight
        across = F.linear(weight, a.to(weight.dtype)).to(b.dtype)  # (out, r)
        own = torch.linalg.vector_norm(weight, dim=1, dtype=b.dtype).square()
        update = 2 * across + self.scale * (b @ (a @ a.t()))
        squares: Tensor = own + self.scale * (update * b).sum(1)
        return squares.sqrt()


def _fast_forward(layer: Any, *, packs: bool) -> FastLora | None:
    """Return the fast forward of a PEFT layer, None where only PEFT's own is right.

    Covered are LoRA, DoRA and AdaLoRA on a frozen linear map with one active adapter.
    """
    dropouts = getattr(layer, "lora_dropout", None)
    if not isinstance(dropouts, nn.ModuleDict) or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if layer.merged or layer.disable_adapters or name not in layer.lora_A:
        return None
    if not isinstance(layer.base_layer, nn.Linear | Conv1D):
        return None
    if any(parameter.requires_grad for parameter in layer.base_layer.parameters()):
        return None  # the fast backward has no gradient for them
    if isinstance(layer.lora_A, nn.ParameterDict):
        return None if layer.ranknum[name].requires_grad else _FastAdaLora(layer, packs=packs)
    if layer.lora_B[name].bias is not None:
        return None
    if name not in layer.lora_variant:
        return FastLora(layer, packs=packs)
    is_dora = name in layer.lora_magnitude_vector
    drops = isinstance(dropouts[name], nn.Dropout) and layer.training  # drops the base's input too
    return FastDora(layer, packs=packs) if is_dora and not drops else None


@contextmanager
def fast_lora(model: Any) -> Iterator[None]:
    """Use the fast forward of every covered adapter and frozen linear map while the body runs.

    `model` is a PeftModel or a plain one. The weights must not change while the body runs.
    """
    packs = packable((m for m in model.modules() if is_frozen(m)), copies=2)
    forwards: dict[nn.Module, Callable[..., Tensor]] = {
        module: FrozenLinear(module, packs=True) for module in packs
    }
    for layer in adapted_modules(model).values():
        fast = _fast_forward(layer, packs=getattr(layer, "base_layer", None) in packs)
        if fast is not None:
            forwards[layer] = fast
    with patched_forwards(forwards):
        yield
