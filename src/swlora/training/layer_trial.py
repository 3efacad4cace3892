"""Short trainings that compare layers: same examples, same seconds, same held-out examples.

How long they are is planned from the number of steps alone, so that a training that is over sooner
than its measurement is never measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swlora.config import RunSpec, TrainSpec, default_rate, method_rate
from swlora.data.token_sequences import TokenSequences
from swlora.models.anatomy import Anatomy
from swlora.training.layer_profile import tried_as
from swlora.training.schedule import Schedule, Step
from swlora.training.short_training import train_shortly, without_held_out

N_TRIED = 3  # choices of layers: all, the last ones, the middle
N_HELD_OUT_LOSSES = 2 * N_TRIED  # of each: in the end, and of fewer layers also on the way
PROFILED_STEPS, PROFILED_EXAMPLES = 3, 96  # at least
TRIAL_STEPS, TRIAL_EXAMPLES = 8, 256  # with all layers, at least
TRIAL_SHARE = 0.08  # of what can be saved
MAX_TRIAL_FACTOR = 5  # a trial is at most so many times the shortest one
MIN_SAVED_FACTOR = 2.0  # measuring must be able to save so many times what it costs


@dataclass(frozen=True)
class TrialPlan:
    """Which steps are profiled, trained on and held out, and whether that is worth its time.

    Costs are in steps with all layers. `n_saved` is what the budget could save of `n_steps`.
    """

    n_steps: int
    n_saved: float
    n_trial: int
    n_profiled: int
    examples_per_step: int
    trained: list[list[np.ndarray]]
    held_out: list[list[np.ndarray]]

    @property
    def profiled(self) -> Sequence[Step]:
        """The steps that times and gradients are taken from."""
        return self.trained[: self.n_profiled]

    @property
    def cost_steps(self) -> int:
        """About how many steps with all layers the whole measurement takes."""
        profile = 1 + 2 * self.n_profiled  # a step to warm up; each whole and in parts
        forward = 0.5  # a loss without its gradient, or less
        losses = math.ceil(N_HELD_OUT_LOSSES * forward * max(1, len(self.held_out)))
        return profile + N_TRIED * self.n_trial + losses

    @property
    def objection(self) -> str | None:
        """Say why nothing shall be measured; None where it shall."""
        if self.n_saved < MIN_SAVED_FACTOR * self.cost_steps:
            return (
                f"of the {self.n_steps} steps the budget can save the time of {self.n_saved:.0f} "
                f"at most, and choosing layers takes that of about {self.cost_steps}"
            )
        if not self.held_out:
            return f"an epoch of {len(self.trained)} steps has too few rows to hold some out"
        return None


def plan_trial(schedule: Schedule, sequences: TokenSequences, budget: float) -> TrialPlan:
    """Plan the measurement for a training of which `budget` of the time may be taken."""
    n_saved = (1 - budget) * schedule.n_steps
    steps = schedule.epoch(0)
    per_step = math.ceil(len(sequences) / len(steps))
    shortest = max(TRIAL_STEPS, math.ceil(TRIAL_EXAMPLES / per_step))
    n_trial = min(MAX_TRIAL_FACTOR * shortest, max(shortest, round(TRIAL_SHARE * n_saved)))
    n_profiled = max(PROFILED_STEPS, math.ceil(PROFILED_EXAMPLES / per_step))
    held_out, trained = without_held_out(steps, len(sequences))
    return TrialPlan(schedule.n_steps, n_saved, n_trial, n_profiled, per_step, trained, held_out)


@dataclass(frozen=True)
class TrialLosses:
    """Held-out losses in nats a token: before, after the first `plan.n_trial` steps, and after all.

    None where the training broke off because its loss or gradient was not finite.
    """

    before_nats: float
    early_nats: float | None
    last_nats: float | None


def try_layers(
    model: Any,
    sequences: TokenSequences,
    spec: RunSpec,
    layers: Sequence[int],
    plan: TrialPlan,
    *,
    n_steps: int,
    advance: Callable[[], None],
) -> TrialLosses:
    """Train fresh adapters in `layers` for `n_steps` at the asked rate; take them off again.

    Every call begins with the same weights, examples and random numbers. Where no rate is asked
    for it is that of as many layers, as in the training. Where LoRA stands for another method, its
    rate is to LoRA's default as the asked one is to that method's.
    """
    tried, n_layers = tried_as(spec.adapter), Anatomy(model).n_layers
    rate = default_rate(tried, n_adapted=len(layers), n_layers=n_layers)
    if (asked := spec.train.learning_rate) is not None:
        rate = asked * method_rate(tried) / method_rate(spec.adapter)
    train = spec.train.model_copy(update={"learning_rate": rate})
    trained = spec.model_copy(update={"adapter": tried, "train": train})
    schedule = _trial_schedule(train, plan, n_steps)
    at = (0, plan.n_trial, n_steps)
    losses = train_shortly(model, sequences, trained, layers, schedule, plan.held_out, at, advance)
    before = losses[0]
    assert before is not None  # nothing was trained
    return TrialLosses(before, losses.get(plan.n_trial), losses[n_steps])


def _trial_schedule(spec: TrainSpec, plan: TrialPlan, n_steps: int) -> Schedule:
    """Return `n_steps` steps over and over the same examples, at one rate after the warm-up.

    The warm-up is that of `plan.n_trial` steps in every trial, so that losses after as many steps
    come of the same rates.
    """
    n_warmup = round(spec.warmup_fraction * plan.n_trial)
    constant = spec.model_copy(
        update={
            "schedule": "constant",
            "max_steps": n_steps,
            "epochs": n_steps,
            "warmup_fraction": n_warmup / n_steps,
        }
    )
    return Schedule(constant, lambda _epoch: plan.trained, len(plan.trained))
