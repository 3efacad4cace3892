"""What optimisers over pairs (A, B) of adapters have in common: the update is B A, (out, in)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class PairOptimizer(torch.optim.Optimizer):
    """An optimiser of pairs A (r, in), B (out, r), whose parameters lie A, B, A, B, ... in a group.

    A factor without a gradient is left as it is, with its state; the other one is changed.
    """

    def __init__(self, pairs: Sequence[Pair], defaults: dict[str, Any]) -> None:
        for a, b in pairs:
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"{tuple(a.shape)} and {tuple(b.shape)} are no A and B of an adapter"
                )
        super().__init__([factor for pair in pairs for factor in pair], defaults)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Yield A, B and the settings of their group."""
        for group in self.param_groups:
            params = group["params"]
            for a, b in zip(params[::2], params[1::2], strict=True):
                yield a, b, group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Change every factor that has a gradient; closures are refused."""
        if closure is not None:
            raise ValueError("this optimiser takes no closure")
        self._step()

    def _step(self) -> None:
        raise NotImplementedError
