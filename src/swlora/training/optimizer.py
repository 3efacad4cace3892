"""The optimiser of a training, whose parameters each may have a factor on the learning rate."""

from typing import Any

import torch

from swlora.adapters.adapted import Adapted
from swlora.config import TrainSpec


def make_optimizer(adapted: Adapted, spec: TrainSpec) -> torch.optim.Optimizer:
    """Return AdamW over all that is trained."""
    return torch.optim.AdamW(
        rate_groups(adapted),
        lr=spec.rate,
        weight_decay=spec.weight_decay,
        fused=True,
    )


def rate_groups(adapted: Adapted) -> list[dict[str, Any]]:
    """Return the parameters in a group for each factor on the learning rate."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in adapted.parameters.items():
        groups.setdefault(adapted.rate(name), []).append(parameter)
    return [{"params": members, "factor": factor} for factor, members in groups.items()]
