"""What a training does with its loss on held-out rows: keep the best adapter, stop in time.

The state is part of the checkpoint. The best adapter is written before a checkpoint can refer to
it, and steps after the last checkpoint are done again; so a run that was killed at any moment and
resumed has the same best adapter, and stops at the same step, as one that never stopped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.direction import is_better
from swlora.errors import DivergedError, RunFailedError
from swlora.files import restore_folder
from swlora.processes import from_main

METRIC = "nll"
Observer = Callable[[int], dict[str, Any]]
SaveAdapter = Callable[[Path, int, float], None]


@dataclass(frozen=True)
class HeldOutLosses:
    """Held-out losses in nats a token, of which there is one at least; `best_step` had the best."""

    n_measured: int
    first: float
    best: float
    last: float
    best_step: int
    n_since_best: int


@dataclass
class HeldOutState:
    """The held-out losses so far, in nats a token, and when the best of them was measured."""

    n_measured: int = 0
    first: float | None = None
    best: float | None = None
    last: float | None = None
    best_step: int = 0
    n_since_best: int = 0

    def add(self, step: int, loss: float) -> bool:
        """Take in the loss after `step`; say whether it is the best. Equal is not better."""
        self.n_measured += 1
        self.first = loss if self.first is None else self.first
        self.last = loss
        if self.best is not None and not is_better(METRIC, loss, self.best):
            self.n_since_best += 1
            return False
        self.best, self.best_step, self.n_since_best = loss, step, 0
        return True

    def forget_best(self) -> None:
        """Take the next loss as the best, since the adapter of the best so far is gone.

        Until then the end is where it was: other processes do not know of it before that.
        """
        self.best, self.best_step = None, 0

    def losses(self) -> HeldOutLosses | None:
        """Return what was measured so far, None where nothing was (since a best was forgotten)."""
        if self.first is None or self.best is None or self.last is None:
            return None
        return HeldOutLosses(
            self.n_measured, self.first, self.best, self.last, self.best_step, self.n_since_best
        )


@dataclass(frozen=True)
class Watch:
    """Measures every `every_steps` steps, and after the last one.

    `measure(step)` returns what is added to the metrics of the step, with "eval_nll" among it; it
    must leave weights, mode and random generators as they were. `save(folder, step,
    loss)` writes the adapter as it is then, the best into `best_folder`; without them none is kept.
    `patience` is how many measurements in a row may be no better until the training ends.
    """

    measure: Observer
    every_steps: int
    patience: int | None = None
    best_folder: Path | None = None
    save: SaveAdapter | None = None

    def after_step(self, state: HeldOutState, n_done: int, n_steps: int) -> dict[str, Any]:
        """Measure where it is time to; keep the adapter where it is the best so far.

        Raises DivergedError for a loss that is not finite.
        """
        if n_done % self.every_steps and n_done != n_steps:
            return {}
        found = self.measure(n_done)
        loss = found["eval_nll"]
        if not math.isfinite(loss):
            raise DivergedError(f"the loss on held-out rows is not finite after step {n_done}")
        # The first process alone has a folder, with which the best may have been removed.
        vars(state).update(from_main(lambda: vars(state)))
        is_best = state.add(n_done, loss)
        if is_best and self.save and self.best_folder:
            self.save(self.best_folder, n_done, loss)
        return found

    def is_over(self, state: HeldOutState) -> bool:
        """Say whether the loss has not been better for `patience` measurements."""
        return self.patience is not None and state.n_since_best >= self.patience

    def lose_best(self, state: HeldOutState) -> None:
        """Forget the best where its adapter is gone, so that the next one is kept, and resumed."""
        if self.best_folder is not None and not self.best_folder.is_dir():
            state.forget_best()

    def resume(self, state: HeldOutState) -> None:
        """Check that the best adapter is there; RunFailedError where somebody took it away."""
        if self.best_folder is None:
            return
        restore_folder(self.best_folder)
        if state.best_step and not self.best_folder.is_dir():
            raise RunFailedError(
                f"{self.best_folder} is gone, the adapter of step {state.best_step}; put it back, "
                "or start again in another --output"
            )
