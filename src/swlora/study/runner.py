"""One process after another: every run of a study is one, and leaves an ordinary run folder.

Runs that are done are skipped; one that was interrupted is resumed where it left a checkpoint, else
made again; one that failed is noted with its reason and the study goes on. Every run has a cache of
its own, so that the states below the lowest adapted layer are never there from another run; what
else is in the user's cache, such as the embedded model, is linked into it.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.config import RunSpec, dump_yaml, load_recorded_spec
from swlora.errors import DivergedError, UserError
from swlora.locks import lock_folder
from swlora.progress import duration
from swlora.runs import read_run
from swlora.snapshots import has_snapshot
from swlora.study.folder import StudyFolder, remove
from swlora.study.live import Board, View
from swlora.study.one_process import LOG, Command, child_command, fill_cache, start_process
from swlora.study.plan import Task
from swlora.work_folder import failure_of

POLL_S = 0.5
STOPPED = "the study was stopped"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: done, failed or cancelled; the reason where it is not done.

    `has_diverged`: it failed because its learning rate was too high.
    """

    status: str
    reason: str | None = None
    has_diverged: bool = False


@dataclass(frozen=True)
class _Begun:
    """A run whose folder is ready: whether it goes on, and the seconds that it took until then."""

    resume: bool
    before_s: float


class Runner:
    """Runs tasks in the folder of a study, and shows and records what becomes of them."""

    def __init__(
        self, study: StudyFolder, board: Board, view: View, command: Command = child_command
    ) -> None:
        self._study, self._board, self._view, self._command = study, board, view, command

    def ahead(self, tasks: Sequence[Task]) -> None:
        """Begin runs that `run` will be asked for; nothing where one runs at a time, as here."""

    def close(self) -> None:
        """End what still runs: nothing here."""

    def is_over(self, task: Task) -> bool:
        """Say that a run is there and need not be made."""
        facts = run_facts(self._study.folder / task.folder)
        return facts is not None and is_over(facts, task)

    def run(self, task: Task) -> Outcome:
        """Run one task, unless it is done; KeyboardInterrupt ends it as cancelled and goes on up.

        Raises UserError where its folder holds a run of other settings, or one that is at work.
        """
        begun = self._begin(task)
        if isinstance(begun, Outcome):
            return begun
        self._board.start(task)
        self._record(task, Outcome("running"), begun.before_s)
        start_s = time.monotonic()
        try:
            code = self._process(task, begun.resume)
        except KeyboardInterrupt:
            stopped = Outcome("cancelled", STOPPED)
            self._note(task, stopped, begun.before_s + time.monotonic() - start_s)
            raise
        remove(self._cache(task))
        return self._end(task, code, begun.before_s, time.monotonic() - start_s)

    def _begin(self, task: Task) -> "Outcome | _Begun":
        """Make the folder of a run ready; how it ended, where it need not be made."""
        folder = self._study.folder / task.folder
        facts = run_facts(folder)
        if facts is not None and is_over(facts, task):
            _check_same(folder, task)
            return self._note(task, _outcome(facts, 0, folder), self._seconds(task))
        if folder.exists():
            _check_free(folder)
        resume = task.phase == "runs" and has_snapshot(folder / "checkpoint")
        if resume:
            _check_same(folder, task)
        else:
            remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return _Begun(resume, self._seconds(task) or 0.0 if resume else 0.0)

    def _end(self, task: Task, code: int, before_s: float, now_s: float, at: str = "") -> Outcome:
        """Say and record how a process ended that took `now_s` seconds."""
        folder = self._study.folder / task.folder
        outcome = _outcome(run_facts(folder), code, folder)
        reason = f": {outcome.reason}" if outcome.reason else ""
        self._view.say(f"{task.folder} {outcome.status} in {duration(now_s)}{at}{reason}")
        return self._note(task, outcome, before_s + now_s)

    def _process(self, task: Task, resume: bool) -> int:
        """Start the run's process and wait for it; return its exit code."""
        cache = self._cache(task)
        fill_cache(cache)
        with tempfile.TemporaryDirectory() as scratch:
            config = Path(scratch) / "config.yaml"
            config.write_text(dump_yaml(task.spec), encoding="utf-8")
            command = self._command(task, self._study.folder, config, resume)
            folder = self._study.folder / task.folder
            process = start_process(command, folder, {"SWLORA_CACHE": str(cache)})
            try:
                while True:
                    self._view.show(self._board, self._study.folder)
                    try:
                        return process.wait(timeout=POLL_S)
                    except subprocess.TimeoutExpired:
                        continue
            except BaseException:
                self._stop(process)
                raise

    def _stop(self, process: "subprocess.Popen[bytes]") -> None:
        """Ask a process to stop and wait for it; another interruption kills it."""
        process.terminate()
        self._view.say("stopping the run after its present step (again: at once)")
        try:
            process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _note(self, task: Task, outcome: Outcome, seconds: float | None) -> Outcome:
        self._board.end(task, outcome.status, seconds)
        self._record(task, outcome, seconds)
        return outcome

    def _record(self, task: Task, outcome: Outcome, seconds: float | None) -> None:
        values = {
            "phase": task.phase,
            "arm": task.arm,
            "label": task.label,
            "status": outcome.status,
            "reason": outcome.reason,
            "seconds": None if seconds is None else round(seconds, 3),
            **self._circumstances(task, outcome),
        }
        if values != self._study.facts["runs"].get(task.folder):
            self._study.record_run(task.folder, **values)

    def _circumstances(self, task: Task, outcome: Outcome) -> dict[str, Any]:
        """Return the system's load when the run began: a busy machine makes timings worthless."""
        if outcome.status == "running":
            return {"load_before": round(os.getloadavg()[0], 2)}
        return {"load_before": self._study.facts["runs"].get(task.folder, {}).get("load_before")}

    def _seconds(self, task: Task) -> float | None:
        """Return the seconds that study.json has of a run."""
        known = self._study.facts["runs"].get(task.folder, {}).get("seconds")
        return None if known is None else float(known)

    def _cache(self, task: Task) -> Path:
        return self._study.caches / task.folder.replace("/", "-")


def run_facts(folder: Path) -> dict[str, Any] | None:
    """Return what run.json says, or None where there is none that can be read."""
    try:
        return read_run(folder)
    except UserError:
        return None


def is_over(facts: dict[str, Any], task: Task) -> bool:
    """Say that a run need not be made: it is done, or its rate was found to be too high."""
    return facts["status"] == "done" or (task.phase == "rates" and _has_diverged(facts))


def _has_diverged(facts: dict[str, Any]) -> bool:
    failure = failure_of(facts) if facts["status"] == "failed" else None
    return failure is not None and failure.code == DivergedError.code


def _outcome(facts: dict[str, Any] | None, code: int, folder: Path) -> Outcome:
    status = (facts or {}).get("status")
    if code == 0 and status == "done":
        return Outcome("done")
    if facts is not None and status in ("failed", "cancelled"):
        return Outcome(str(status), str(facts.get("reason")), _has_diverged(facts))
    if code < 0:
        return Outcome("failed", f"its process was ended by {signal.Signals(-code).name}")
    return Outcome("failed", _last_line(folder / LOG) or f"its process ended with code {code}")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _check_same(folder: Path, task: Task) -> None:
    """Refuse a folder whose run had other settings than the task, where they matter to it."""
    before = load_recorded_spec(folder / "config.yaml", {})
    if _that_matter(before, task) != _that_matter(task.spec, task):
        raise UserError(
            f"{folder} holds a run with other settings than the study now asks for; remove the "
            "folder, or choose another --output"
        )


def _that_matter(spec: RunSpec, task: Task) -> Any:
    """Return the settings of a run on which depends what it finds.

    Super weights are those of a model, whatever is trained: several arms share a search. A trial of
    layers keeps the learning rate that it had, which is not the same in every version.
    """
    if task.phase != "identify":
        return _without_place_of_start(spec, task.spec)
    if spec.adapter.layers.needs_identification:
        return spec.model, spec.identify, spec.adapter.layers
    return spec.model_copy(update={"train": spec.train.model_copy(update={"learning_rate": None})})


def _without_place_of_start(spec: RunSpec, asked: RunSpec) -> RunSpec:
    """Return settings without those that a run reads from the adapter that it starts from.

    It notes the place of that by names and numbers, where the study has all-linear or last:2, and
    refuses another one; and it notes what the study leaves open.
    """
    if asked.adapter.start is None:
        return spec
    read: dict[str, Any] = {"targets": None, "layers": None}
    if asked.adapter.lora_plus_ratio is None:
        read["lora_plus_ratio"] = None
    return spec.model_copy(update={"adapter": spec.adapter.model_copy(update=read)})


def _check_free(folder: Path) -> None:
    """Refuse a folder in which another process is at work."""
    lock_folder(folder).release()
