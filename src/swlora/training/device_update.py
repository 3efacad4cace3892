"""A step's end on a GPU: the device decides whether the weights change, and is waited for once.

A loss or norm that is read before the update makes the device stand still until the host has seen
it. Fused AdamW takes a flag that is on the device: where it is set, weights and moments stay as
they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swlora.adapters.adapted import Adapted
from swlora.loss_sum import LossSum


class DeviceLoss(LossSum):
    """A summed loss that the device may still compute; to ask for `sum_nats` is to wait for it."""

    nats: Tensor

    def __init__(self, nats: Tensor, n_tokens: float) -> None:
        object.__setattr__(self, "nats", nats)
        object.__setattr__(self, "n_tokens", n_tokens)

    @property
    def sum_nats(self) -> float:  # type: ignore[override]
        """The loss in nats."""
        return float(self.nats)


def nats_on(device: torch.device, loss: LossSum) -> Tensor:
    """Return the loss in nats on the device, a float64 scalar; not waited for."""
    if isinstance(loss, DeviceLoss):
        return loss.nats.to(device, torch.float64)
    return torch.tensor(loss.sum_nats, dtype=torch.float64, device=device)


class Outcome(NamedTuple):
    """What a step came to, as numbers: loss, norm of the gradient, whether the weights are usable.

    The weights have changed where loss and norm are finite.
    """

    loss: LossSum
    norm: float
    is_usable: bool


def decides_on_device(adapted: Adapted) -> bool:
    """Say whether an update can be left to the device: no method acts on the host after it."""
    device = next(iter(adapted.parameters.values())).device
    return device.type == "cuda" and type(adapted).after_step is Adapted.after_step


def update_where_finite(
    optimizer: Any, loss: LossSum, norm: Tensor, usable: Callable[[], Tensor]
) -> Outcome:
    """Let a fused optimizer step, unless loss or norm is not finite; wait for the device at last.

    `usable` makes a bool scalar of the weights as they are then.
    """
    nats = nats_on(norm.device, loss)
    optimizer.found_inf = (~(nats.isfinite() & norm.isfinite())).to(torch.float32)
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf
    numbers = torch.stack([nats, norm.to(torch.float64), usable().to(torch.float64)])
    sum_nats, norm_value, is_usable = numbers.tolist()
    return Outcome(LossSum(sum_nats, loss.n_tokens), norm_value, bool(is_usable))
