"""Norms and gated activations with one hand-written backward each, instead of a chain of casts.

    RMSNorm  y = w x / rms(x)        dx = r (w dy) - x r^3 mean(x w dy),  r = 1 / rms(x)
    SwiGLU   h = silu(g) u           dg = dh u silu'(g),  du = dh silu(g)

Arithmetic is float32 inside, in the model's dtype outside, as in transformers; frozen weights get
no gradient. Classes that are not known here keep their own forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.tree_attention import wide

RMS_NORMS = frozenset(
    f"{family}RMSNorm" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "SmolLM3")
)
SWIGLU_MLPS = frozenset(
    f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Olmo2")
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_wide = wide(x)
        r = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, r)
        return (x_wide * r).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        scaled = wide(grads[0] * weight)
        normed = wide(x) * r
        projection = (scaled * normed).mean(-1, keepdim=True)
        return scaled.sub_(normed * projection).mul_(r).to(x.dtype), None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return d_gate, F.silu(gate).mul_(grads[0])


_rms_norm: Callable[..., Tensor] = _RmsNorm.apply
_silu_mul: Callable[..., Tensor] = _SiluMul.apply


class _FastRmsNorm:
    def __init__(self, module: Any) -> None:
        self.weight, self.eps = module.weight, float(module.variance_epsilon)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _rms_norm(hidden_states, self.weight, self.eps)
        normed = F.rms_norm(hidden_states, hidden_states.shape[-1:], None, self.eps)
        return normed.mul_(self.weight)  # rounded before and after, as in transformers


class _FastSwiglu:
    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        m = self.module
        return m.down_proj(_silu_mul(m.gate_proj(x), m.up_proj(x)))  # type: ignore[no-any-return]


class _ContiguousLinear:
    """A head that copies the few rows it is given, not its weight.

    generate() hands the head a slice of the prompt's states; torch turns the product with such a
    strided batch into one with a copy of the weight for every row.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.contiguous(), self.module.weight, self.module.bias)


def _replacement(module: nn.Module) -> Any:
    name = type(module).__name__
    if name in RMS_NORMS and not any(p.requires_grad for p in module.parameters()):
        return _FastRmsNorm(module)
    if name in SWIGLU_MLPS and isinstance(getattr(module, "act_fn", None), nn.SiLU):
        return _FastSwiglu(module)
    if name in SWIGLU_MLPS and type(getattr(module, "act_fn", None)).__name__ == "SiLUActivation":
        return _FastSwiglu(module)
    return None


@contextmanager
def fused_modules(model: Any) -> Iterator[None]:
    """Use the fused forward of every known norm and MLP while the body runs."""
    head = model.get_output_embeddings()
    replacements: dict[nn.Module, Any] = {}
    for module in model.modules():
        # Not an adapter around it, nor one that has a fast forward already
        is_plain = isinstance(module, nn.Linear) and "forward" not in vars(module)
        forward = _ContiguousLinear(module) if module is head and is_plain else _replacement(module)
        if forward is not None:
            replacements[module] = forward
    with patched_forwards(replacements):
        yield
