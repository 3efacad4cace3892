"""Every fast forward there is, as a value: a forward for each module that has one.

`patched_forwards` puts them into a model. Made once, they serve until another adapter is active:
what they keep of weights (casts, norms, copies in the kernels' layout) goes with them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from swlora.kernels.fused import fused_forwards
from swlora.kernels.linear.frozen import FrozenLinear
from swlora.kernels.lora import FastLora, lora_forwards


def fast_forwards(model: Any) -> dict[nn.Module, Callable[..., Tensor]]:
    """Return the forwards for LoRA, frozen linear maps, norms and MLPs.

    `model` is a causal language model or a PeftModel of one. While they are in use without a
    `refresh`, no weight of an adapter may change; frozen weights may, other than through `.data`.
    """
    return {**fused_forwards(model), **lora_forwards(model)}


def uncalled(module: nn.Module, fast: Callable[..., Tensor]) -> list[nn.Module]:
    """Return the parts of a module that its own forward calls, and its fast one does not."""
    if isinstance(fast, FastLora):
        return list(module.modules())[1:]
    return [part for part in module.children() if next(part.parameters(), None) is None]


def has_hooks(module: nn.Module) -> bool:
    """Say whether somebody's hooks run when a module is called, or its gradient is made."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def refresh(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> None:
    """Let the forwards follow weights that have changed, as those of an adapter do in a step."""
    for forward in forwards.values():
        if isinstance(forward, FastLora | FrozenLinear):
            forward.refresh()
