"""The adapter of a training that did not end: made of the newest checkpoint, wherever it stands.

The run folder is read and left as it is, so that it can still go on with --resume.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.attachment import attach
from swlora.config import RunSpec, load_recorded_spec
from swlora.errors import UserError
from swlora.files import check_writable
from swlora.job import COMPUTES, Job
from swlora.locks import lock_folder
from swlora.metrics_file import read_metrics
from swlora.pipeline import choose_layers
from swlora.preparation import prepare_training
from swlora.progress import Progress
from swlora.run_place import RESUMABLE
from swlora.run_record import MemoryRecord
from swlora.run_settings import (
    OF_THE_ADAPTER,
    Change,
    changes_of,
    differences,
    flat,
    shown_differences,
)
from swlora.runs import read_result, read_run
from swlora.snapshots import has_snapshot
from swlora.work_folder import other_source


@dataclass(frozen=True)
class Recovered:
    """An adapter made of a checkpoint, after `step` of `n_steps` steps."""

    adapter: Path
    adapter_bytes: int
    step: int
    n_steps: int
    n_rows: int


class _Reading(MemoryRecord):
    """What a run noted, for a job that notes nothing in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._noted = folder
        self.facts = read_run(folder) | {"resumed": 1}

    def record_source(self, **facts: Any) -> None:
        """Compare what is worked on with what the run began with; UserError where it differs.

        In what is computed makes no difference: the weights of the checkpoint stay as they are.
        """
        facts.pop(COMPUTES, None)
        if difference := other_source(self.facts, facts):
            raise UserError(f"the checkpoint in {self._noted} is of other work: {difference}")

    def changes_from(self, n_done: int) -> list[Change]:  # noqa: ARG002
        """Return the changes of settings that the run noted."""
        return changes_of(self.facts)

    def read_result(self) -> dict[str, Any]:
        """Return what came out so far: layers are not searched for again."""
        return read_result(self._noted)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Leave the run's result as it is."""


def recover(run: Path, output: Path, progress: Progress) -> Recovered:
    """Make an adapter in `output` of the newest checkpoint of an unfinished training in `run`.

    Model and data are read as the run's configuration says. Raises UserError where there is no
    checkpoint, `output` is in use, the run is at work, or data, tokens or weights are others than
    those that it began with.
    """
    _check(run, output)
    held = lock_folder(run)  # where it is at work, its checkpoint changes
    try:
        return _recover(run, output, progress)
    finally:
        held.release()


def _recover(run: Path, output: Path, progress: Progress) -> Recovered:
    from swlora.adapters.card import last_losses
    from swlora.training.checkpoint import LoopState
    from swlora.training.optimizer import make_optimizer

    spec = load_recorded_spec(run / "config.yaml", {})
    _check_adapter(run, spec)
    job = Job(_here_and_untold(spec), _Reading(run), progress)
    prepared = prepare_training(job)
    attached = attach(job, prepared.schedule, choose_layers(job))
    adapted = attached.adapted
    state = LoopState(adapted, make_optimizer(adapted, prepared.schedule.spec))
    if not state.load(run / "checkpoint", progress.say):
        raise UserError(f"{run} holds no complete checkpoint, no step of it was kept: train again")
    adapted.finish()
    step = state.totals.step
    metrics = [line for line in read_metrics(run) if line["step"] <= step]
    n_steps = prepared.schedule.n_steps
    when = f"recovered after step {step} of {n_steps}"
    losses = {f"{name}, {when}": loss for name, loss in last_losses(metrics).items()}
    n_bytes = attached.save(output, losses, step=step)
    return Recovered(output, n_bytes, step, n_steps, state.totals.rows)


def _here_and_untold(spec: RunSpec) -> RunSpec:
    """Return settings of a run for one process that holds the whole model and tells nobody.

    Trackers, prompts of samples and other processes make no other adapter, and may be gone.
    """
    quiet = {"report_to": [], "sample_prompts": [], "shard": False}
    return spec.model_copy(update={"train": spec.train.model_copy(update=quiet)})


def _check_adapter(run: Path, spec: RunSpec) -> None:
    """Raise UserError where config.yaml was edited in what makes the adapter of a checkpoint."""
    found = differences(read_run(run).get("settings", {}), flat(spec))  # older runs note none
    if others := {name: pair for name, pair in found.items() if name in OF_THE_ADAPTER}:
        raise UserError(
            f"{run / 'config.yaml'} is not as the run left it: {shown_differences(others)}; put "
            "that back"
        )


def _check(run: Path, output: Path) -> None:
    facts = read_run(run)
    if facts["command"] not in RESUMABLE:
        raise UserError(f"{run} is a run of {facts['command']}, which trains no adapter")
    if facts["status"] == "done" or not has_snapshot(run / "checkpoint"):
        done = run / "adapter"
        if done.is_dir():
            raise UserError(f"the training in {run} came to its end: its adapter is {done}")
        raise UserError(f"{run} holds no checkpoint: no step of it was kept")
    check_writable(output, "--output")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; choose another --output")
