"""How long the runs of an arm took, and how much faster they are than the baseline's.

Three accelerations, none of which says all: examples a second once warm, seconds to the end, and
seconds until the held-out loss is what the baseline ends with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from swlora.evaluation.loss_curve import smoothed
from swlora.study import statistics as stats
from swlora.study.collect import ArmRun
from swlora.study.compared import Acceleration, LossCurve, Times, TimeSpread
from swlora.study.statistics import Point


@dataclass(frozen=True)
class Pace:
    """The speed of an arm's runs; `held_out` is their mean curve, empty where none was measured."""

    train_s: list[float]
    total_s: list[float]
    examples_per_s: list[float]
    held_out: list[Point]

    @classmethod
    def of(cls, runs: Sequence[ArmRun]) -> Self:
        """Take the times of finished runs, at least one."""
        return cls(
            [run.train_s for run in runs],
            [run.total_s for run in runs],
            [stats.steady_rate(run.metrics) for run in runs],
            stats.mean_curve([stats.held_out_points(run.metrics) for run in runs]),
        )

    @property
    def one_off_s(self) -> float:
        """Mean seconds that are not training steps."""
        return float(np.mean(self.total_s) - np.mean(self.train_s))

    @property
    def final_nll(self) -> float | None:
        """The last held-out loss."""
        return self.held_out[-1].nll if self.held_out else None

    def seconds_to(self, nll: float) -> float | None:
        """Return the seconds until the held-out loss is `nll`, one-off costs included, or None."""
        training_s = stats.seconds_to(nll, self.held_out)
        return None if training_s is None else self.one_off_s + training_s

    def times(self) -> Times:
        """Return the means over seeds, and the spread."""
        train_s, total_s = stats.spread(self.train_s), stats.spread(self.total_s)
        rate = stats.spread(self.examples_per_s)
        return Times(
            train_s=train_s.mean,
            total_s=total_s.mean,
            examples_per_s=rate.mean,
            time_spread=TimeSpread(train_s, total_s, rate),
        )

    def against(self, baseline: Self) -> Acceleration:
        """Return the accelerations against the baseline; None where something was not measured."""
        target = baseline.final_nll
        seconds = base_seconds = reached = saved = None
        if target is not None and self.held_out:
            seconds, base_seconds = self.seconds_to(target), baseline.seconds_to(target)
            reached = seconds is not None
        if seconds is not None and base_seconds is not None:
            saved = stats.time_saved_percent(seconds, base_seconds)
        own, base = self.times(), baseline.times()
        return Acceleration(
            speed_up_percent=stats.speed_up_percent(own.examples_per_s, base.examples_per_s),
            time_saved_percent=stats.time_saved_percent(own.total_s, base.total_s),
            reached_baseline_nll=reached,
            seconds_to_baseline_nll=seconds,
            time_saved_to_baseline_nll_percent=saved,
        )


def loss_curve(runs: Sequence[ArmRun], pace: Pace) -> LossCurve:
    """Return loss against seconds from the start, of held-out rows or else of the training rows."""
    points, kind = pace.held_out, "held-out"
    if not points:
        points, kind = stats.mean_curve([_smooth(run.metrics) for run in runs]), "training"
    seconds = [pace.one_off_s + point.elapsed_s for point in points]
    return LossCurve(kind, seconds, [point.nll for point in points])


def _smooth(metrics: Sequence[dict[str, Any]]) -> list[Point]:
    metrics = [m for m in metrics if "loss" in m]  # not those of steps that were skipped
    course = smoothed([(m["elapsed_s"], m["loss"]) for m in metrics])
    return [Point(m["step"], *point) for m, point in zip(metrics, course, strict=True)]
