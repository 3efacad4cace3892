"""The seconds of a run, foreseen from its own first ones: nothing is done twice for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from swlora.job import Job
from swlora.preparation import PreparedTraining
from swlora.processes import world
from swlora.progress import duration

if TYPE_CHECKING:
    from swlora.training.forecast import Stopwatch, Work
    from swlora.training.kept_states import KeptStates
    from swlora.training.plain import PlainStep
    from swlora.training.step import TreeStep

AFTER_S = 20.0


@dataclass
class TimeForeseen:
    """Told of every step, says once how long the run will take.

    `seconds` are those of all steps and of what is measured between them; None in runs that are
    over before they could be foreseen, went on from a checkpoint, or are shared by processes.
    """

    prepared: PreparedTraining
    step: "TreeStep | PlainStep"
    kept: "KeptStates"
    stopwatch: "Stopwatch"
    say: Callable[[str], None]
    seconds: float | None = field(default=None, init=False)

    @classmethod
    def of(
        cls, job: Job, prepared: PreparedTraining, step: "TreeStep | PlainStep"
    ) -> "TimeForeseen | None":
        """Return one for a run whose steps are about to begin; None where it cannot know."""
        from swlora.training.forecast import Stopwatch
        from swlora.training.kept_states import kept_by

        if world().is_shared or job.run.facts.get("resumed"):
            return None
        return cls(prepared, step, kept_by(step), Stopwatch(step), job.progress.say)

    def __call__(self, report: Any) -> None:
        """Take in a `StepReport`."""
        if self.seconds is not None:
            return
        self.stopwatch.lap(report.elapsed_s)
        n_done = self.stopwatch.n_laps
        if report.elapsed_s >= AFTER_S and 2 < n_done < self.prepared.schedule.n_steps:
            work = work_of(self.prepared, self.step, self.kept)
            rates = self.stopwatch.rates(work.by_step)
            self.seconds = rates.seconds(work)
            self.say(f"time: about {duration(self.seconds)}, by the first {n_done} steps")


def work_of(prepared: PreparedTraining, step: "TreeStep | PlainStep", kept: "KeptStates") -> "Work":
    """Return what a training runs."""
    from swlora.training.forecast import Work, nodes_below, nodes_by_step
    from swlora.training.step import TreeStep

    schedule, planned, below = prepared.schedule, prepared.measurements, 0.0
    n_measured = -(-schedule.n_steps // planned.every_steps) if planned else 0
    held_out = int(prepared.held_out_nodes.sum()) * n_measured
    if isinstance(step, TreeStep):
        share = kept.missing_share if kept.are_kept else 1.0
        below = share * nodes_below(step, schedule, are_kept=kept.are_kept)
    by_step = nodes_by_step(step, schedule.epoch(0))
    return Work(by_step, schedule.n_steps, round(below), held_out)
