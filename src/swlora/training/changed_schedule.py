"""The steps of a training whose settings were changed on its way, each from its step on.

The rows of an epoch that had been run when a setting changed are not run again, and the others are:
they are planned anew where the change concerns the plan (the rows of a step, what shares one), and
stay in their steps where it does not. From a change on, a step has the learning rate that a
training with the new settings from its beginning would have at the same place in the data.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from swlora.config import TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.training.schedule import (
    Schedule,
    Step,
    fitted,
    learning_rate,
    n_epochs,
    step_plan,
    steps_of_epoch,
)

CHOSEN = ("epochs", "batch_size", "learning_rate")  # by the run itself, where they are not given
OF_THE_PLAN = ("batch_size", "order", "row_tokens")


@dataclass(frozen=True)
class Stretch:
    """What holds from step `first` (0-based) to the next change."""

    first: int
    spec: TrainSpec


@dataclass(frozen=True)
class _Planned:
    """Steps of one epoch that follow one another from step `first` on."""

    first: int
    n_steps: int
    steps: Callable[[], Sequence[Step]]

    def rest(self, n_done: int) -> "_Planned":
        """Return what is left after `n_done` of them."""
        return _Planned(self.first + n_done, self.n_steps - n_done, lambda: self.steps()[n_done:])


@dataclass(frozen=True)
class _Rates:
    """The learning rates of a stretch: where it stands in a training with its settings alone."""

    stretch: Stretch
    offset: float
    n_steps: float

    def at(self, step: int) -> float:
        return learning_rate(self.stretch.spec, step + self.offset, self.n_steps)


class ChangedSchedule(Schedule):
    """The steps of stretches that follow one another, the first from step 0 on."""

    def __init__(self, sequences: TokenSequences, stretches: Sequence[Stretch], seed: int) -> None:
        self._sequences, self._seed = sequences, seed
        self._parts: list[_Planned] = []
        self._rates: list[_Rates] = []
        self._n_before, self._epoch, self._n_seen = 0, 0, 0  # steps; epochs; sequences
        self._left: _Planned | None = None  # of an epoch that a change falls into
        stretches = _with_sizes(stretches, len(sequences))
        self.spec = stretches[-1].spec
        ends = [stretch.first for stretch in stretches[1:]]
        for number, stretch in enumerate(stretches):
            before = stretches[number - 1].spec if number else stretch.spec
            self._replan(before, stretch.spec)
            n_steps = self._n_steps_of(stretch.spec)
            offset = self._n_seen / (stretch.spec.batch_size or 1) - self._n_before
            offset = 0.0 if self._same_sizes(stretches[: number + 1]) else offset
            self._rates.append(_Rates(stretch, offset, n_steps + offset))
            self._run_to(ends[number] if number < len(ends) else n_steps, stretch.spec)
        self.n_steps = n_steps

    @property
    def n_epochs(self) -> int:
        """How many passes over the data are begun."""
        return self._epoch + (self._left is not None)

    def steps(self, n_done: int = 0) -> Iterator[Step]:
        """Yield the steps that are left after `n_done` of them."""
        for part in self._parts:
            if part.first + part.n_steps > n_done:
                planned = part.steps()[: part.n_steps]
                yield from planned[max(0, n_done - part.first) :]

    def epoch(self, number: int) -> list[list[np.ndarray]]:
        """Return all steps of an epoch (0-based), as the settings that hold from now on plan it."""
        return step_plan(self._sequences, self.spec, self._seed)(number)

    def learning_rate(self, step: int) -> float:
        """Return the rate of step `step` (0-based)."""
        return self._rates_of(step).at(step)

    def spec_at(self, step: int) -> TrainSpec:
        """Return the settings of step `step` (0-based)."""
        return self._rates_of(step).stretch.spec

    def _rates_of(self, step: int) -> _Rates:
        return [r for r in self._rates if r.stretch.first <= step][-1]

    def _replan(self, before: TrainSpec, spec: TrainSpec) -> None:
        """Plan the rest of an epoch anew where settings of its plan have changed."""
        if self._left is None or all(getattr(before, n) == getattr(spec, n) for n in OF_THE_PLAN):
            return
        ids = np.sort(np.concatenate([ids for step in self._left.steps() for ids in step]))
        plan, epoch = step_plan(self._sequences.subset(ids), spec, self._seed), self._epoch

        def steps() -> list[Step]:
            return [[ids[group] for group in step] for step in plan(epoch)]

        self._left = _Planned(self._n_before, steps_of_epoch(spec, len(ids)), steps)

    def _n_steps_of(self, spec: TrainSpec) -> int:
        """Return how many steps the training has in all if nothing changes any more."""
        n_to_go = max(0, n_epochs(spec, len(self._sequences)) - self._epoch)
        n_left = self._left.n_steps if self._left and n_to_go else 0
        n_whole = n_to_go - 1 if n_left else n_to_go
        n_steps = self._n_before + n_left + n_whole * steps_of_epoch(spec, len(self._sequences))
        return max(self._n_before, min(n_steps, spec.max_steps or n_steps))

    def _run_to(self, end: int, spec: TrainSpec) -> None:
        """Take the steps up to step `end`, of as many epochs as they need."""
        plan = step_plan(self._sequences, spec, self._seed)
        while self._n_before < end:
            part = self._left or _Planned(
                self._n_before,
                steps_of_epoch(spec, len(self._sequences)),
                partial(plan, self._epoch),
            )
            n_taken = min(part.n_steps, end - self._n_before)
            self._parts.append(_Planned(part.first, n_taken, part.steps))
            self._n_before += n_taken
            self._left = part.rest(n_taken) if n_taken < part.n_steps else None
            self._epoch += self._left is None
        self._n_seen = self._epoch * len(self._sequences)
        if self._left is not None:
            n_left = sum(len(ids) for step in self._left.steps() for ids in step)
            self._n_seen += len(self._sequences) - n_left

    @staticmethod
    def _same_sizes(stretches: Sequence[Stretch]) -> bool:
        return len({stretch.spec.batch_size for stretch in stretches}) == 1


def _with_sizes(stretches: Sequence[Stretch], n_sequences: int) -> list[Stretch]:
    """Give every stretch its epochs, sequences a step and rate: as they were, if not given."""
    spec, sized = fitted(stretches[0].spec, n_sequences), []
    for stretch in stretches:
        before, spec = spec, stretch.spec
        kept = {name: getattr(before, name) for name in CHOSEN if getattr(spec, name) is None}
        spec = spec.model_copy(update=kept)
        sized.append(Stretch(stretch.first, spec))
    return sized
