"""What a training step computes: loss, tokens and the gradient of every parameter."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn


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
