"""What is done with an adapter beside its steps: the mean of its last states, and jumps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FUTILE_JUMPS = 3  # in a row, after which no more are tried


class Average:
    """The mean of the states that trained parameters had, in float64."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor] = []
        self.n = 0

    @torch.no_grad()
    def add(self) -> None:
        """Take the present state in."""
        if not self.n:
            self._sums = [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            total += parameter
        self.n += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Make the mean the state of the parameters; nothing changes before `add`."""
        if self.n:
            for total, parameter in zip(self._sums, self._parameters, strict=True):
                parameter.copy_(total / self.n)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the mean in the parameters while the body runs."""
        before = [p.detach().clone() for p in self._parameters]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, kept in zip(self._parameters, before, strict=True):
                    parameter.copy_(kept)


class Jumps:
    """Fast Forward: the last step again and again, for as long as a loss falls.

    Rahamim and others 2024, arXiv 2409.04206, where every sixth step is followed by a jump,
    measured on a few held-out rows; `loss` measures. After three jumps in a row that gained nothing
    there are no more.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], loss: Callable[[], float]) -> None:
        self._parameters, self._loss = parameters, loss
        self._before: list[Tensor] = []
        self._n_futile = 0
        self.repeats: list[int] = []  # of each jump: how often its step was repeated

    @property
    def is_over(self) -> bool:
        """Whether jumps have been in vain too often."""
        return self._n_futile >= FUTILE_JUMPS

    def before_step(self) -> None:
        """Remember the state before a step that a jump is to follow."""
        self._before = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def after_step(self) -> None:
        """Repeat the step that was made since."""
        change = [p - b for p, b in zip(self._parameters, self._before, strict=True)]
        best, n = self._loss(), 0
        while True:
            kept = [p.clone() for p in self._parameters]
            torch._foreach_add_(list(self._parameters), change)
            loss = self._loss()
            if not loss < best:  # a NaN too ends the jump
                break
            best, n = loss, n + 1
        for parameter, value in zip(self._parameters, kept, strict=True):
            parameter.copy_(value)
        self.repeats.append(n)
        self._n_futile = 0 if n else self._n_futile + 1
