"""What a training step computes, loss, tokens and the gradient of every parameter, and takes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from swlora.adapters.methods import trainable_parameters
from swlora.training.live_bytes import LiveBytes


class Measured(NamedTuple):
    """Summed loss in nats, completion tokens, and gradients by name."""

    sum_nats: float
    n_tokens: int
    gradients: dict[str, Tensor]


def measure(
    step: Any, parameters: Mapping[str, nn.Parameter], trees: Sequence[np.ndarray]
) -> Measured:
    """Run the step on the sequence ids of each tree; every parameter must get a gradient."""
    for parameter in parameters.values():
        parameter.grad = None
    loss = step(trees)
    gradients: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[name] = parameter.grad.clone()
    return Measured(loss.sum_nats, loss.n_tokens, gradients)


def peak_bytes(step: Any, groups: Sequence[np.ndarray]) -> int:
    """Return the most bytes of tensors while the step runs; its gradients are dropped."""
    with LiveBytes() as live:
        step(groups)
    for parameter in trainable_parameters(step.peft_model).values():
        parameter.grad = None
    return live.peak_bytes
