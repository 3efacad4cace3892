"""All steps of a training: which rows each one takes, and at which learning rate.

Both are pure functions of the step's number, so a resumed training needs no state for them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from swlora.config import TrainSpec
from swlora.data.steps import plan_steps
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError

Step = Sequence[np.ndarray]


class StepPlan(Protocol):
    """The steps of one epoch, a pure function of the epoch number."""

    def __call__(self, epoch: int, /) -> list[list[np.ndarray]]:
        """Return the steps; each is a list of rows, each row an array of sequence ids."""


class Schedule:
    """The steps of every epoch of `spec`, each epoch planned once, when it begins.

    Raises RunFailedError where there is no step at all.
    """

    def __init__(self, spec: TrainSpec, plan: StepPlan, n_steps_per_epoch: int) -> None:
        self.spec = spec
        self._plan = plan
        self._n_steps_per_epoch = n_steps_per_epoch
        n_planned = spec.epochs * n_steps_per_epoch
        self.n_steps = min(n_planned, spec.max_steps or n_planned)
        if self.n_steps == 0:
            raise RunFailedError("the training data holds no step; nothing was trained")

    @classmethod
    def of(cls, sequences: TokenSequences, spec: TrainSpec, seed: int) -> "Schedule":
        """Return the schedule that `spec` asks for on these sequences."""
        n_steps_per_epoch = math.ceil(len(sequences) / spec.batch_size)  # see plan_steps
        return cls(spec, step_plan(sequences, spec, seed), n_steps_per_epoch)

    def steps(self, n_done: int = 0) -> Iterator[Step]:
        """Yield the steps that are left after `n_done` of them."""
        while n_done < self.n_steps:
            epoch = n_done // self._n_steps_per_epoch
            first = epoch * self._n_steps_per_epoch
            steps = self._plan(epoch)
            if len(steps) != self._n_steps_per_epoch:
                raise RunFailedError(
                    f"epoch {epoch} has {len(steps)} steps and not {self._n_steps_per_epoch}"
                )
            yield from steps[n_done - first : self.n_steps - first]
            n_done = first + self._n_steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return the rate of step `step` (0-based)."""
        return learning_rate(self.spec, step, self.n_steps)


def step_plan(sequences: TokenSequences, spec: TrainSpec, seed: int) -> StepPlan:
    """Return the plan that `spec` asks for: `plan_steps` as a function of the epoch."""

    def plan(epoch: int) -> list[list[np.ndarray]]:
        return plan_steps(
            sequences,
            sequences_per_step=spec.batch_size,
            max_tokens_per_row=spec.row_tokens,
            order=spec.order,
            seed=seed,
            epoch=epoch,
        )

    return plan


def learning_rate(spec: TrainSpec, step: int, n_steps: int) -> float:
    """Return the rate of step `step` (0-based): linear warm-up, then the schedule down to 0."""
    n_warmup = round(spec.warmup_fraction * n_steps)
    if step < n_warmup:
        return spec.learning_rate * (step + 1) / n_warmup
    if spec.schedule == "constant":
        return spec.learning_rate
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    if spec.schedule == "linear":
        return spec.learning_rate * (1 - progress)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
