"""How sure a comparison is, and how much faster: intervals, paired differences, verdicts, rates.

A draw of the bootstrap takes n of the n prompts (MRs) with replacement, the same ones for every
arm and seed, and scores them anew. Seeds are too few to be drawn (two of them would give an
interval that holds the true mean half of the time), so a draw is, over an arm's S seeds,

    mean of the seeds' scores + t * sd of them / sqrt(S),    t of Student's distribution, S - 1

A difference of two arms is made seed by seed before that, of the seeds that both have: it is paired
in prompts and seeds. An arm with one seed has an interval for the choice of prompts alone.

    time saved % = 100 (1 - t / t_baseline)      speed-up % = 100 (rate / rate_baseline - 1)
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
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

_FINER = 101
WARM_UP_SHARE = 0.05  # of the steps, at least one: caches fill, memory is first touched


class Point(NamedTuple):
    """A held-out loss that was measured during training: at a step, after so much training."""

    step: int
    elapsed_s: float
    nll: float


def seed_draws(
    segments: Mapping[int, Segments], n_draws: int = N_DRAWS
) -> dict[str, dict[int, Draws]]:
    """Return the draws (R,) of every score and of "NLL", by the seeds of an arm's runs.

    A score that a run lacks (METEOR without Java) is left out. Raises ValueError where the runs
    have unequal numbers of prompts.
    """
    sizes = {len(segments[seed]) for seed in segments}
    if len(sizes) != 1:
        raise ValueError(f"runs of {sorted(sizes)} prompts cannot be compared")
    weights = prompt_weights(sizes.pop(), n_draws)
    found = {seed: segments[seed].resampled(weights) for seed in sorted(segments)}
    first, *others = found.values()
    return {
        name: {seed: scores[name] for seed, scores in found.items()}
        for name in first
        if all(name in scores for scores in others)
    }


def over_seeds(draws: Mapping[int, Draws]) -> Draws:
    """Return draws (R,) of the mean over seeds, as wide as so few seeds leave it."""
    seeds = tuple(sorted(draws))
    values = np.stack([draws[seed] for seed in seeds])
    found: Draws = values.mean(axis=0)
    if len(seeds) > 1:
        error = values.std(axis=0, ddof=1) / math.sqrt(len(seeds))
        found = found + _student(seeds, len(found)) * error
    return found


def differences(draws: Mapping[int, Draws], of_baseline: Mapping[int, Draws]) -> Draws:
    """Return draws (R,) of an arm's score less the baseline's, by the seeds that both have.

    Where they have none in common it is that of their means.
    """
    if common := draws.keys() & of_baseline.keys():
        return over_seeds({seed: draws[seed] - of_baseline[seed] for seed in common})
    return over_seeds(draws) - over_seeds(of_baseline)


@cache
def _student(seeds: tuple[int, ...], n_draws: int) -> Draws:
    """Return draws (R,) of Student's t for as many seeds; the same for the same seeds.

    Of many draws every so many-th is taken, so that the ends are where they belong.
    """
    rng = np.random.default_rng([BOOTSTRAP_SEED, *seeds])
    many = np.sort(rng.standard_t(len(seeds) - 1, size=n_draws * _FINER))
    return rng.permutation(many[_FINER // 2 :: _FINER])


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
    """Return the mean over seeds of loss and time, at the steps that all of them measured.

    One that ended early keeps its last loss and time at the steps after it.
    """
    by_step = [{point.step: point for point in curve} for curve in curves]
    found = []
    for step in sorted({step for points in by_step for step in points}):
        at = [
            curve[-1] if curve and step >= curve[-1].step else points.get(step)
            for curve, points in zip(curves, by_step, strict=True)
        ]
        known = [point for point in at if point is not None]
        if len(known) == len(curves):
            elapsed_s = float(np.mean([point.elapsed_s for point in known]))
            found.append(Point(step, elapsed_s, float(np.mean([point.nll for point in known]))))
    return found


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
