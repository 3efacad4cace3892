"""Settings of every method, and adapters whose weights have moved as by some training."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from swlora.adapters.methods import METHODS, adapt, trainable_parameters
from swlora.config import AdapterSpec

SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 3, "alpha": 6.0} for name in METHODS},
    "full": {},
    "supertuning": {"sparsity": 0.9},
}
CASES = [
    (method, model_type)
    for method in METHODS
    for model_type in ("gpt2", "llama")
    if not (METHODS[method].linear_only and model_type == "gpt2")
]


def adapter_spec(method: str, **changes: Any) -> AdapterSpec:
    return AdapterSpec(method=method, **SETTINGS[method] | changes)  # type: ignore[arg-type]


def move(parameters: Iterable[nn.Parameter], size: float, seed: int = 2) -> None:
    """Add normal numbers of this standard deviation to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def randomise(peft_model: Any, size: float, seed: int = 2) -> None:
    """Make every trained weight a normal number of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(peft_model).values():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def fill_b(peft_model: Any, size: float = 0.03, seed: int = 2) -> None:
    """Make every B of LoRA as large as after some training, where A is as it was drawn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainable_parameters(peft_model).items():
            if "lora_B" in name:
                parameter.normal_(std=size, generator=generator)


def attach(model: Any, spec: AdapterSpec, layers: Sequence[int], *, seed: int) -> Any:
    """Return the PeftModel of `adapt`, for those who need nothing else of it."""
    return adapt(model, spec, layers, seed=seed).model
