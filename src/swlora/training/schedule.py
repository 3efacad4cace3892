"""All steps of a training: which sequences each one takes, and at which learning rate.

Both are pure functions of the step's number, so a resumed training needs no state for them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from swlora.config import DEFAULT_BATCH_SIZE, FEW_ROWS, FEW_STEPS, PASSES, TrainSpec
from swlora.data.steps import plan_steps, steps_per_epoch
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError
from swlora.plural import counted

Step = Sequence[np.ndarray]


class StepPlan(Protocol):
    """The steps of one epoch, a pure function of the epoch number."""

    def __call__(self, epoch: int, /) -> list[list[np.ndarray]]:
        """Return the steps; each is a list of groups, the sequence ids of one tree each."""


class Schedule:
    """The steps of every epoch of `spec`, each planned once, when it is first asked for.

    Raises RunFailedError where there is no step at all.
    """

    def __init__(self, spec: TrainSpec, plan: StepPlan, n_steps_per_epoch: int) -> None:
        self.spec = spec
        self._plan = plan
        self._n_steps_per_epoch = n_steps_per_epoch
        self._planned: tuple[int, list[list[np.ndarray]]] | None = None  # the last epoch asked for
        n_planned = (spec.epochs or 1) * n_steps_per_epoch
        self.n_steps = min(n_planned, spec.max_steps or n_planned)
        if self.n_steps == 0:
            raise RunFailedError("the training data holds no step; nothing was trained")

    @classmethod
    def of(cls, sequences: TokenSequences, spec: TrainSpec, seed: int) -> "Schedule":
        """Return the schedule that `spec` asks for on these sequences."""
        spec = fitted(spec, len(sequences))
        n_steps = steps_of_epoch(spec, len(sequences))
        return cls(spec, step_plan(sequences, spec, seed), n_steps)

    @property
    def n_epochs(self) -> int:
        """How many passes over the data are begun."""
        return math.ceil(self.n_steps / self._n_steps_per_epoch)

    @property
    def n_sequences(self) -> int:
        """About how many sequences are run, each counted once in every epoch."""
        return self.n_steps * (self.spec.batch_size or 1)

    def steps(self, n_done: int = 0) -> Iterator[Step]:
        """Yield the steps that are left after `n_done` of them."""
        while n_done < self.n_steps:
            epoch = n_done // self._n_steps_per_epoch
            first = epoch * self._n_steps_per_epoch
            yield from self.epoch(epoch)[n_done - first : self.n_steps - first]
            n_done = first + self._n_steps_per_epoch

    def epoch(self, number: int) -> list[list[np.ndarray]]:
        """Return all steps of an epoch (0-based)."""
        if self._planned and self._planned[0] == number:
            return self._planned[1]
        steps = self._plan(number)
        if len(steps) != self._n_steps_per_epoch:
            raise RunFailedError(
                f"epoch {number} has {len(steps)} steps and not {self._n_steps_per_epoch}"
            )
        self._planned = number, steps
        return steps

    def learning_rate(self, step: int) -> float:
        """Return the rate of step `step` (0-based)."""
        return learning_rate(self.spec, step, self.n_steps)

    def spec_at(self, step: int) -> TrainSpec:  # noqa: ARG002 - a changed one has several
        """Return the settings of step `step` (0-based)."""
        return self.spec


def fitted(spec: TrainSpec, n_sequences: int, largest_size: int = DEFAULT_BATCH_SIZE) -> TrainSpec:
    """Return `spec` with the epochs and the sequences per step that it leaves to the data."""
    size = sequences_per_step(spec, n_sequences, largest_size)
    return spec.model_copy(update={"epochs": n_epochs(spec, n_sequences), "batch_size": size})


def n_epochs(spec: TrainSpec, n_sequences: int) -> int:
    """Return the passes over the data: what was asked for, else 1, or 3 where data are few."""
    return spec.epochs or (PASSES if n_sequences < FEW_ROWS else 1)


def sequences_per_step(spec: TrainSpec, n_sequences: int, largest: int = DEFAULT_BATCH_SIZE) -> int:
    """Return the sequences per step: what was asked for, else 16, or fewer where data are few.

    Then it is the largest that makes at least 20 steps, or as many as `max_steps` allows.
    """
    if spec.batch_size is not None:
        return spec.batch_size
    n_wanted = min(FEW_STEPS, spec.max_steps or FEW_STEPS)
    n_per_epoch = math.ceil(n_wanted / n_epochs(spec, n_sequences))
    sizes = range(largest, 1, -1)
    return next((s for s in sizes if steps_per_epoch(n_sequences, s) >= n_per_epoch), 1)


def steps_of_epoch(spec: TrainSpec, n_sequences: int) -> int:
    """Return the steps of one pass over so many sequences."""
    return steps_per_epoch(n_sequences, sequences_per_step(spec, n_sequences))


def planned_steps(spec: TrainSpec, n_sequences: int) -> int:
    """Return how many steps a training on so many sequences has, all epochs of it."""
    n_planned = n_epochs(spec, n_sequences) * steps_of_epoch(spec, n_sequences)
    return min(n_planned, spec.max_steps or n_planned)


def begun_epochs(spec: TrainSpec, n_sequences: int) -> int:
    """Return how many passes over the data are begun: all of them, unless `max_steps` ends it."""
    return math.ceil(planned_steps(spec, n_sequences) / steps_of_epoch(spec, n_sequences))


def data_note(spec: TrainSpec, n_sequences: int) -> str | None:
    """Say what few sequences mean for epochs and steps, where there is something to say."""
    size, n_steps = sequences_per_step(spec, n_sequences), planned_steps(spec, n_sequences)
    epochs, rows, chosen = begun_epochs(spec, n_sequences), counted(n_sequences, "row"), {}
    if spec.epochs is None and epochs > 1:
        chosen["--epochs"] = counted(epochs, "epoch")
    if spec.batch_size is None and size < DEFAULT_BATCH_SIZE:
        chosen["--batch-size"] = f"{counted(size, 'row')} a step"
    if chosen:
        others = "sets another number" if len(chosen) == 1 else "set other numbers"
        return (
            f"few data ({rows}): {', '.join(chosen.values())}, {counted(n_steps, 'step')} in all "
            f"({' and '.join(chosen)} {others})"
        )
    if n_steps < min(FEW_STEPS, spec.max_steps or FEW_STEPS):
        advice = "more --epochs or a smaller --batch-size" if size > 1 else "more --epochs"
        make = "makes" if n_sequences == 1 else "make"
        steps = f"{counted(n_steps, 'step')} of {counted(size, 'row')}"
        return f"{rows} {make} only {steps}; {advice} makes more"
    return None


def step_plan(sequences: TokenSequences, spec: TrainSpec, seed: int) -> StepPlan:
    """Return the plan that `spec` asks for: `plan_steps` as a function of the epoch."""

    def plan(epoch: int) -> list[list[np.ndarray]]:
        return plan_steps(
            sequences,
            sequences_per_step=sequences_per_step(spec, len(sequences)),
            max_tokens_per_tree=spec.row_tokens,
            order=spec.order,
            seed=seed,
            epoch=epoch,
        )

    return plan


def learning_rate(spec: TrainSpec, step: float, n_steps: float) -> float:
    """Return the rate of step `step` (0-based, or between two): warm-up, then the schedule to 0."""
    n_warmup = round(spec.warmup_fraction * n_steps)
    if step < n_warmup:
        return spec.rate * (step + 1) / n_warmup
    if spec.schedule == "constant":
        return spec.rate
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    if spec.schedule == "linear":
        return spec.rate * (1 - progress)
    return spec.rate * 0.5 * (1 + math.cos(math.pi * progress))
