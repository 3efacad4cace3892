"""The learning rate by measurement, for `--find-learning-rate`.

Short trainings, alike but for their rate, begin with the default of method and layers and go on to
twice and half the rates until the held-out loss is higher on both sides of the lowest. With E
passes over the rows

    rate = bottom of the parabola through these three, over the logarithm of the rate, / sqrt(E)

is taken: rows that are seen again want a lower one (docs/results.md, "A rate that is found").
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from swlora.config import RunSpec, default_rate
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError
from swlora.models.anatomy import Anatomy
from swlora.plural import counted
from swlora.progress import Progress
from swlora.threads import adapted_threads
from swlora.training.schedule import Schedule
from swlora.training.short_training import (
    finite_or_none,
    loss_or_infinity,
    loss_text,
    train_shortly,
    without_held_out,
)

N_STEPS = 8  # of each trial
STEP = 2.0  # from one rate to the next
MOST_TRIALS = 8  # between 2 ** 6 times the default and 2 ** -5, and one beyond


@dataclass(frozen=True)
class RateTrial:
    """A rate, and the held-out loss in nats a token that it came to; None: it diverged."""

    learning_rate: float
    loss_nats: float | None


@dataclass(frozen=True)
class FoundRate:
    """The rate taken, why, and everything that was measured."""

    learning_rate: float
    reason: str
    n_steps: int = 0
    n_held_out: int = 0
    measured_s: float = 0.0
    loss_before_nats: float | None = None
    trials: list[RateTrial] = field(default_factory=list)


@adapted_threads()
def choose(
    model: Any,
    sequences: TokenSequences,
    spec: RunSpec,
    layers: Sequence[int],
    schedule: Schedule,
    progress: Progress,
) -> FoundRate:
    """Find the learning rate of adapters in `layers` of a base model, for a training by `schedule`.

    The model's weights are the same afterwards, to the last bit. Where too few rows can be held out
    it is the default. Raises RunFailedError where every rate diverges.
    """
    start_s, n_layers = time.perf_counter(), Anatomy(model).n_layers
    default = default_rate(spec.adapter, n_adapted=len(layers), n_layers=n_layers)
    steps = schedule.epoch(0)
    held_out, trained = without_held_out(steps, len(sequences))
    if not held_out:
        few = f"the default, for an epoch of {counted(len(steps), 'step')} has too few to hold out"
        return FoundRate(default, few)
    n_steps = min(N_STEPS, schedule.n_steps)
    losses: dict[float, float] = {}
    before: float | None = None
    while (rate := next_rate(losses, default)) is not None:
        changed = {"learning_rate": rate, "epochs": n_steps, "max_steps": n_steps}
        tried = spec.model_copy(update={"train": schedule.spec.model_copy(update=changed)})
        short = Schedule(tried.train, lambda _epoch: trained, len(trained))
        at = [n_steps] if losses else [0, n_steps]  # they all begin with the same loss
        with progress.task(f"try a rate of {rate:g}", n_steps) as task:
            found = train_shortly(
                model, sequences, tried, layers, short, held_out, at, partial(task.advance, 1.0)
            )
        before, losses[rate] = found.get(0, before), loss_or_infinity(found[n_steps])
    best = _lowest(losses)
    if math.isfinite(losses[best]) and before is not None and losses[best] >= before:
        rate, reason = default, "the default, for no rate that was tried lowers the loss"
    else:
        rate, reason = chosen(losses, n_steps, schedule.n_steps / len(steps))
    return FoundRate(
        rate,
        reason,
        n_steps=n_steps,
        n_held_out=sum(len(ids) for groups in held_out for ids in groups),
        measured_s=time.perf_counter() - start_s,
        loss_before_nats=before,
        trials=[RateTrial(r, finite_or_none(losses[r])) for r in sorted(losses)],
    )


def chosen(losses: dict[float, float], n_steps: int, n_passes: float) -> tuple[float, str]:
    """Return (rate, reason) by the losses that rates came to in `n_steps` steps."""
    best = _lowest(losses)
    if not math.isfinite(losses[best]):
        raise RunFailedError(
            f"every learning rate from {min(losses):g} to {max(losses):g} diverges within "
            f"{counted(n_steps, 'step')}"
        )
    bottom = best * STEP ** offset(*(losses.get(r) for r in (best / STEP, best, STEP * best)))
    reason = f"the lowest loss after {counted(n_steps, 'step')} is foreseen at {bottom:.2g}"
    if best in (min(losses), max(losses)):
        reason += ", the end of what was tried"
    if n_passes > 1:
        reason += f", here divided by the root of {n_passes:.2g} passes"
    return float(f"{bottom / math.sqrt(max(1.0, n_passes)):.1e}"), reason


def offset(below: float | None, lowest: float | None, above: float | None) -> float:
    """Return where a parabola through losses at -1, 0 and 1 has its bottom, -0.5 to 0.5.

    One that diverged is infinitely high. It is 0 beside one that was not tried, and where all are
    alike.
    """
    if below is None or lowest is None or above is None or below == above:
        return 0.0
    if math.inf in (below, above):
        return -0.5 if above == math.inf else 0.5
    return 0.5 * (below - above) / (below - 2 * lowest + above)


def next_rate(losses: dict[float, float], default: float) -> float | None:
    """Return the next rate to try after those that came to `losses`; None: the lowest is inside.

    The default comes first and then twice as much; an infinite loss is one that diverged.
    """
    if not losses:
        return default
    if len(losses) == MOST_TRIALS:
        return None
    best = _lowest(losses)
    if math.isfinite(losses[best]) and STEP * best not in losses:
        return STEP * best
    return best / STEP if best / STEP not in losses else None


def lines(choice: FoundRate) -> Iterator[str]:
    """Lay out a choice and what it was made from, for a person."""
    if choice.trials:
        yield (
            f"{choice.measured_s:.0f} s of trying rates, {choice.n_steps} steps each; nats a token "
            f"on {choice.n_held_out} held-out rows, {choice.loss_before_nats:.3f} before:"
        )
    for trial in choice.trials:
        yield f"{trial.learning_rate:<12g}{loss_text(trial.loss_nats):>10}"
    yield f"learning rate {choice.learning_rate:g}: {choice.reason}"


def _lowest(losses: dict[float, float]) -> float:
    """Return the rate with the lowest loss, of equal ones the lowest."""
    return min(losses, key=lambda rate: (losses[rate], rate))
