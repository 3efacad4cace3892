"""The course of a training as its metrics.jsonl tells it: smoothed, summed up, and as a picture."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.files import atomic_path
from swlora.loss_sum import LossSum
from swlora.training.pace import mean_pace
from swlora.training.trained import TrainingCourse

if TYPE_CHECKING:
    from swlora.training.checkpoint import LoopState
    from swlora.training.schedule import Schedule

Point = tuple[float, float]
FINAL_SHARE = 0.1


def smoothed(points: Sequence[Point], share: float = 0.04) -> list[Point]:
    """Return the means of y over about `share` of the points around each, fewer at both ends."""
    reach = round(share * len(points) / 2)
    sums = [0.0, *accumulate(y for _, y in points)]
    means = []
    for number, (x, _) in enumerate(points):
        first, end = max(0, number - reach), min(len(points), number + reach + 1)
        means.append((x, (sums[end] - sums[first]) / (end - first)))
    return means


def final_loss(metrics: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Return (mean loss over the last tenth of the steps in nats a token, their number).

    One step alone says little: its rows may be easy or hard. Skipped ones have none.
    """
    metrics = [m for m in metrics if "loss" in m]
    last = metrics[-max(1, round(FINAL_SHARE * len(metrics))) :]
    total = sum((LossSum(m["sum_nats"], m["n_tokens"]) for m in last), LossSum())
    return total.nats_per_token, len(last)


def course_of(
    state: "LoopState", schedule: "Schedule", metrics: Sequence[dict[str, Any]]
) -> TrainingCourse:
    """Return how a training went, by its last state and its metrics."""
    totals, held_out = state.totals, state.held_out
    loss, n_averaged = final_loss(metrics)
    return TrainingCourse(
        rows=totals.rows,
        batch_size=schedule.spec.batch_size,
        epochs=schedule.n_epochs,
        steps=totals.step,
        planned_steps=schedule.n_steps,
        learning_rate=schedule.spec.rate,
        train_s=totals.elapsed_s,
        examples_per_s=totals.rows / totals.elapsed_s,
        last_loss=next(m["loss"] for m in reversed(metrics) if "loss" in m),
        final_loss=loss,
        final_loss_steps=n_averaged,
        held_out=held_out.losses(),
        pace=mean_pace(metrics),
        skipped_steps=totals.skipped or None,
    )


def draw_loss(metrics: Sequence[dict[str, Any]], target: Path) -> None:
    """Draw the loss of every step, its smoothed course and that on held-out rows, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    steps = [(m["rows"], m["loss"]) for m in metrics if "loss" in m]
    held_out = [(m["rows"], m["eval_nll"]) for m in metrics if "eval_nll" in m]
    panel.plot(*_columns(steps), alpha=0.3, linewidth=1, color="tab:blue", label="each step")
    panel.plot(*_columns(smoothed(steps)), color="tab:blue", label="smoothed")
    if held_out:
        panel.plot(*_columns(held_out), color="tab:orange", marker="o", label="held-out rows")
    panel.set_xlabel("rows of the data set seen")
    panel.set_ylabel("loss, nats a trained token")
    panel.grid(True, alpha=0.3)
    panel.legend()
    with atomic_path(target) as scratch:
        figure.savefig(scratch, format="png", dpi=140)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
