"""A training with torch's own AdamW over the plain step: what short trainings must come to."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from swlora.loss_sum import LossSum


def hashes_of(model: Any) -> dict[str, str]:
    """Return a hash of every parameter's bits, by its name."""
    return {n: hashlib.sha256(p.numpy(force=True)).hexdigest() for n, p in model.named_parameters()}


def update(step: Any, groups: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Make one step of the optimizer by the mean gradient of a token."""
    n_tokens = step(groups).n_tokens
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= n_tokens
    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def held_out_nats(step: Any, steps: Sequence[Any], optimizer: torch.optim.Optimizer) -> float:
    """Return the loss on steps in nats a token, and leave no gradient."""
    loss = sum((step(groups) for groups in steps), LossSum())
    optimizer.zero_grad()
    return loss.nats_per_token
