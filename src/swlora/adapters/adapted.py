"""An adapted model in training: what is trained, and what a method does besides descending.

The loop asks for learning-rate multipliers, for a term to add to the mean loss, and for what is to
be done after a step; a checkpoint asks for the state that is in no parameter; and what is saved and
used after the training is made by `finish`. Most methods need nothing of all this.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from swlora.config import LORA_PLUS_RATIO, AdapterSpec

NAME = "default"  # how PEFT calls an adapter that was given no name


class Adapted:
    """A PeftModel whose method does nothing but descend; other methods say what they do more."""

    def __init__(self, model: Any, spec: AdapterSpec) -> None:
        self.model = model
        self.spec = spec
        self.parameters = trainable_parameters(model)

    def rate(self, _name: str) -> float:
        """Return the factor on the learning rate of the parameter with this name."""
        return 1.0

    def penalty(self) -> Tensor | None:
        """Return a scalar whose gradient is added to that of the mean loss, once a step."""
        return None

    def after_step(self, n_done: int) -> None:
        """Act on the weights after the optimizer's step `n_done` (the first is 1).

        The gradients of the step are still there.
        """

    @property
    def score_bytes(self) -> int:
        """The bytes of one score for every trained weight, where the method keeps scores; else 0.

        They are there from the first step on: what `state` returns before it has none.
        """
        return 0

    def state(self) -> dict[str, Tensor]:
        """Return what an exact resume needs besides the parameters, by name."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        if tensors:
            raise ValueError(f"this method has no state, but was given {sorted(tensors)[0]}")

    def finish(self) -> None:
        """Make the model what is saved and used from now on; nothing is trained after it."""

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """Be what `finish` makes while the body saves it; afterwards, bit for bit as before."""
        yield

    @property
    def ranks(self) -> dict[str, int] | None:
        """The rank of every projection, by its full name, where the method allots ranks."""
        return None


class LoraPlus(Adapted):
    """LoRA+ (arXiv 2402.12354): the learning rate of B is a multiple of A's."""

    def rate(self, name: str) -> float:
        """Return the ratio for B, 1 for A."""
        return (self.spec.lora_plus_ratio or LORA_PLUS_RATIO) if ".lora_B." in name else 1.0


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name, in a fixed order."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
