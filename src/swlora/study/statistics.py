"""How sure a comparison is, and how much faster: intervals, paired differences, verdicts, rates.

A draw of the bootstrap takes n of the n prompts (MRs) with replacement, the same ones for every
arm, and S - 1 of an arm's S seeds with replacement; an arm's score in a draw is the mean over its
drawn seeds of the corpus score of the drawn prompts. S - 1, because the mean of S draws would vary
too little: (S - 1)/S of the unbiased variance (Rao and Wu 1988). Arms with the same seeds draw the
same ones, so a difference of two arms is paired in prompts and seeds. An arm with one seed has an
interval for the choice of prompts alone.

    time saved % = 100 (1 - t / t_baseline)      speed-up % = 100 (rate / rate_baseline - 1)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from swlora.evaluation.bootstrap import (
    BOOTSTRAP_SEED,
    N_DRAWS,
    Draws,
    Interval,
    prompt_weights,
)
from swlora.evaluation.segments import Segments
from swlora.study.compared import Spread

Verdict = Literal["non-inferior", "inferior", "undecided"]

WARM_UP_SHARE = 0.05  # of the steps, at least one: caches fill, memory is first touched


class Point(NamedTuple):
    """A held-out loss that was measured during training: at a step, after so much training."""

    step: int
    elapsed_s: float
    nll: float


def seed_weights(seeds: Sequence[int], n_draws: int = N_DRAWS) -> Draws:
    """Return each seed's share of each draw, (R, S), rows of sum 1; equal for equal seeds."""
    if len(seeds) == 1:
        return np.ones((n_draws, 1))
    n_drawn = len(seeds) - 1
    rng = np.random.default_rng([BOOTSTRAP_SEED, *seeds])
    shares = np.full(len(seeds), 1 / len(seeds))
    return rng.multinomial(n_drawn, shares, size=n_draws) / n_drawn


def bootstrap(segments: Mapping[int, Segments], n_draws: int = N_DRAWS) -> dict[str, Draws]:
    """Return the draws (R,) of every score and of "NLL" of an arm, from its runs by seed.

    A score that a run lacks (METEOR without Java) is left out. Raises ValueError where the runs
    have unequal numbers of prompts.
    """
    seeds = sorted(segments)
    sizes = {len(segments[seed]) for seed in seeds}
    if len(sizes) != 1:
        raise ValueError(f"runs of {sorted(sizes)} prompts cannot be compared")
    weights = prompt_weights(sizes.pop(), n_draws)
    by_seed = [segments[seed].resampled(weights) for seed in seeds]
    shares = seed_weights(seeds, n_draws)
    names = [name for name in by_seed[0] if all(name in scores for scores in by_seed)]
    return {
        name: (shares * np.stack([scores[name] for scores in by_seed], axis=1)).sum(axis=1)
        for name in names
    }


def verdict(difference: Interval, margin: float, *, larger_is_better: bool) -> Verdict:
    """Judge an arm from the interval of (arm - baseline): how much worse may it be?

    Non-inferior where all of the interval is better than `margin` worse, inferior where all of it
    is worse than that, else undecided.
    """
    gain = difference if larger_is_better else Interval(-difference.high, -difference.low)
    if gain.low > -margin:
        return "non-inferior"
    return "inferior" if gain.high < -margin else "undecided"


def spread(values: Sequence[float]) -> Spread:
    """Return mean, smallest, largest and standard deviation (None for one value) over seeds."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), min(values), max(values), sd)


def steady_rate(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Return rows of the data set a second of training, without the warm-up steps.

    The first `WARM_UP_SHARE` of the steps, at least one, are left out; of a single step nothing.
    """
    if len(metrics) == 1:
        return float(metrics[0]["rows"] / metrics[0]["elapsed_s"])
    n_warm_up = max(1, math.ceil(WARM_UP_SHARE * len(metrics)))
    first, last = metrics[n_warm_up - 1], metrics[-1]
    return float((last["rows"] - first["rows"]) / (last["elapsed_s"] - first["elapsed_s"]))


def held_out_points(metrics: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the held-out losses among the lines of metrics.jsonl."""
    return [
        Point(m["step"], m["elapsed_s"], m["eval_sum_nats"] / m["eval_n_tokens"])
        for m in metrics
        if "eval_sum_nats" in m
    ]


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the mean over seeds of loss and time, at the steps that all of them have."""
    by_step = [{point.step: point for point in curve} for curve in curves]
    common = sorted(set.intersection(*map(set, by_step))) if by_step else []
    return [
        Point(
            step,
            float(np.mean([points[step].elapsed_s for points in by_step])),
            float(np.mean([points[step].nll for points in by_step])),
        )
        for step in common
    ]


def seconds_to(target: float, curve: Sequence[Point]) -> float | None:
    """Return after how many seconds of training the loss first is `target`; None where never.

    Between two points the loss is taken to fall in a straight line.
    """
    previous: Point | None = None
    for point in curve:
        if point.nll <= target:
            if previous is None:
                return point.elapsed_s
            share = (previous.nll - target) / (previous.nll - point.nll)
            return previous.elapsed_s + share * (point.elapsed_s - previous.elapsed_s)
        previous = point
    return None


def time_saved_percent(seconds: float, baseline_s: float) -> float:
    """Return the share of the baseline's time that is saved; negative where it takes longer."""
    return 100 * (1 - seconds / baseline_s)


def speed_up_percent(rate: float, baseline_rate: float) -> float:
    """Return how much more is done a second than by the baseline; negative where less is."""
    return 100 * (rate / baseline_rate - 1)
