"""LoRA without casts and copies, on the modules that PEFT built.

    y = x W' + b + s (x A') B'        u = s dy B
    dx = dy W + u A     dA = u' x     dB = s dy' (x A')

Forward keeps x and the r-wide product x A'; the adapter's matrices are used in the model's dtype
and their gradients return in float32. LoRA+, rsLoRA and PiSSA are this with other numbers; AdaLoRA
has diag(e) A in the place of A. DoRA scales y, before the bias, by m / ||W + s B A||, one number an
output channel, whose norm is a constant to the gradient (arXiv 2402.09353, section 4.3).
PEFT's own forward stays in place for what this does not cover (several adapters at once).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swlora.adapters.methods import adapted_modules
from swlora.kernels.first_order import first_order
from swlora.kernels.linear.frozen import FrozenLinear, frozen_forwards, reshaped
from swlora.models.linear_maps import is_linear_map


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
    @first_order
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
    """The fast forward of one PEFT LoRA layer, whose frozen linear map is `frozen`.

    What it makes of the adapter's weights once is kept until `refresh`.
    """

    def __init__(self, layer: Any, frozen: FrozenLinear) -> None:
        name = layer.active_adapters[0]
        self.frozen = frozen
        self.scale = float(layer.scaling[name])
        self.dropout = layer.lora_dropout[name]
        self.p = float(getattr(self.dropout, "p", 0.0))
        self._matrices = layer.lora_A[name], layer.lora_B[name]
        self._cast: tuple[Tensor, Tensor] | None = None

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r), with a graph where gradients are on."""
        a, b = self._matrices
        return a.weight, b.weight

    def refresh(self) -> None:
        """Follow the adapter's weights, which have changed."""
        self._cast = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in)."""
        return self.product(x, self.frozen.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x (W + s B A)' + bias, with the adapter's dropout where it is on."""
        drops = self.p > 0 and self.dropout.training
        if not torch.is_grad_enabled() and not drops:
            return self._without_graph(x, bias)
        x_dropped = F.dropout(x, self.p) if drops else x.detach()
        return _lora_linear(x, x_dropped, self.frozen, bias, *self.matrices(), self.scale)

    def _without_graph(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Generation calls this for every token: the adapter is scaled and cast only once."""
        if self._cast is None:
            a, b = self.matrices()
            self._cast = a.to(x.dtype), (b * self.scale).t().to(x.dtype).contiguous()
        a, b = self._cast
        rows = x.reshape(-1, x.shape[-1])
        y = self.frozen.product(rows, bias).addmm_(F.linear(rows, a), b)
        return y.view(*x.shape[:-1], -1)


class _FastAdaLora(FastLora):
    """y = x W' + b + s / r0 (x (diag(e) A)') B', with r0 the rank it started with."""

    def __init__(self, layer: Any, frozen: FrozenLinear) -> None:
        super().__init__(layer, frozen)
        name = layer.active_adapters[0]
        self._singular_values = layer.lora_E[name]
        self.scale /= float(layer.ranknum[name].detach()) + 1e-5  # as PEFT does

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return diag(e) A and B."""
        a, b = self._matrices
        return a * self._singular_values, b


class FastDora(FastLora):
    """y = c (x W' + s (x A') B') + b with c = m / ||W + s B A||, (out,), in float32.

    Where dropout is switched on later, PEFT's own forward is used.
    """

    def __init__(self, layer: Any, frozen: FrozenLinear) -> None:
        super().__init__(layer, frozen)
        self._layer = layer
        self._magnitude: nn.Parameter = layer.lora_magnitude_vector[layer.active_adapters[0]].weight
        self._norm: Tensor | None = None

    def refresh(self) -> None:
        """Follow the adapter's weights, which have changed."""
        super().refresh()
        self._norm = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in)."""
        if _drops_base_input(self._layer):
            return type(self._layer).forward(self._layer, x)  # type: ignore[no-any-return]
        if self._norm is None:
            self._norm = self._channel_norms()
        y = self.product(x, None) * (self._magnitude / self._norm)
        bias = self.frozen.bias
        return (y if bias is None else y + bias).to(x.dtype)

    @torch.no_grad()
    def _channel_norms(self) -> Tensor:
        """Return the norms of the rows of W + s B A, (out,), from products that are r wide.

        ||w + s A' b||^2 = ||w||^2 + 2 s b (A w) + s^2 b A A' b'
        """
        a, b = self.matrices()
        weight = self.frozen.weight
        across = F.linear(weight, a.to(weight.dtype)).to(b.dtype)  # (out, r)
        own = torch.linalg.vector_norm(weight, dim=1, dtype=b.dtype).square()
        update = 2 * across + self.scale * (b @ (a @ a.t()))
        squares: Tensor = own + self.scale * (update * b).sum(1)
        return squares.sqrt()


def _fast_kind(layer: Any) -> type[FastLora] | None:
    """Return the class of a PEFT layer's fast forward, None where only PEFT's own is right.

    Covered are LoRA, DoRA and AdaLoRA on a frozen linear map with one active adapter.
    """
    dropouts = getattr(layer, "lora_dropout", None)
    if not isinstance(dropouts, nn.ModuleDict) or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if layer.merged or layer.disable_adapters or name not in layer.lora_A:
        return None
    if not is_linear_map(layer.base_layer):
        return None  # weights that another library packed, which its own forward knows to read
    if any(parameter.requires_grad for parameter in layer.base_layer.parameters()):
        return None  # the fast backward has no gradient for them
    if isinstance(layer.lora_A, nn.ParameterDict):
        return None if layer.ranknum[name].requires_grad else _FastAdaLora
    if layer.lora_B[name].bias is not None:
        return None
    if name not in layer.lora_variant:
        return FastLora
    is_dora = name in layer.lora_magnitude_vector
    return FastDora if is_dora and not _drops_base_input(layer) else None


def _drops_base_input(layer: Any) -> bool:
    """Say whether PEFT's DoRA drops the input of the frozen map, too, in the layer's mode."""
    return layer.training and isinstance(layer.lora_dropout[layer.active_adapters[0]], nn.Dropout)


def lora_forwards(model: Any) -> dict[nn.Module, FastLora | FrozenLinear]:
    """Return the fast forward of every covered adapter and frozen linear map.

    `model` is a PeftModel or a plain one; which adapter is active must stay as it is.
    """
    frozen = frozen_forwards(model)
    forwards: dict[nn.Module, FastLora | FrozenLinear] = {**frozen}
    for layer in adapted_modules(model).values():
        if kind := _fast_kind(layer):
            base: Any = layer.base_layer
            forwards[layer] = kind(layer, frozen.get(base) or FrozenLinear(base))
    return forwards
