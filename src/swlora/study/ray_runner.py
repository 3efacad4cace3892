"""The runs of a study on the machines of a cluster, as many at a time as it has room for.

What a run leaves is in the study's folder in the end, as if it had run here: machines that see the
folder work in it, the others send files. A run whose machine or process is lost begins again, from
its checkpoint where that can be seen.
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from swlora.config import dump_yaml
from swlora.files import write_text
from swlora.metrics_file import METRICS
from swlora.paths import expanded
from swlora.study.folder import StudyFolder, remove
from swlora.study.live import Board, View
from swlora.study.plan import Task
from swlora.study.remote_work import TOKEN, order_of, read_files, unpack
from swlora.study.runner import POLL_S, STOPPED, Outcome, Runner, run_facts
from swlora.study.spec import StudySpec

MOST_LOST = 3  # times that a run may be lost before it counts as failed
STOPS_S = 90.0


class Cluster(Protocol):
    """Machines that do runs; see `swlora.study.ray_cluster.RayCluster`."""

    n_cpus: int

    @property
    def n_at_once(self) -> int:
        """How many runs there can be at a time."""

    def look_around(self, order: Mapping[str, Any]) -> bool:
        """Say whether all machines see the study's folder; UserError where one is no use."""

    def start(self, folder: str, order: Mapping[str, Any]) -> None:
        """Hand in an order."""

    def messages(self, wait_s: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (folder, message)."""

    def cancel(self, *, at_once: bool = False) -> None:
        """Stop what runs."""

    def forget(self) -> None:
        """Take no more notice of what runs."""


@dataclass
class _Remote:
    """A run that was handed in: where it is, since when, and how often it was lost."""

    task: Task
    before_s: float
    n_lost: int = 0
    start_s: float | None = None
    host: str = ""

    @property
    def now_s(self) -> float:
        """Seconds since it began, on its present machine."""
        return 0.0 if self.start_s is None else time.monotonic() - self.start_s


class RayRunner(Runner):
    """Runs tasks on a cluster; those announced by `ahead` while one is waited for, too."""

    def __init__(
        self, spec: StudySpec, study: StudyFolder, board: Board, view: View, cluster: Cluster
    ) -> None:
        super().__init__(study, board, view)
        self._cluster, self._token = cluster, secrets.token_hex(16)
        self._running: dict[str, _Remote] = {}
        self._over: dict[str, Outcome] = {}
        self._about: dict[str, dict[str, Any]] = {}
        board.n_at_once = cluster.n_at_once
        study.caches.mkdir(exist_ok=True)
        write_text(study.caches / TOKEN, self._token)
        self._all_see = True
        look = Task("runs", "", "", "", spec.run_spec({}))
        self._all_see = cluster.look_around(self._order(look))
        seen = "see" if self._all_see else "do not all see"
        view.say(f"the machines {seen} {study.folder}{'' if self._all_see else ': files are sent'}")

    def ahead(self, tasks: Sequence[Task]) -> None:
        """Hand in the orders for runs that `run` will be asked for."""
        for task in tasks:
            if task.folder in self._running or task.folder in self._over:
                continue
            begun = self._begin(task)
            if isinstance(begun, Outcome):
                self._over[task.folder] = begun
                continue
            self._running[task.folder] = _Remote(task, begun.before_s)
            self._cluster.start(task.folder, self._order(task))

    def run(self, task: Task) -> Outcome:
        """Return how a run ended, after all that ended before it was noted too."""
        self.ahead([task])
        try:
            while task.folder not in self._over:
                self._view.show(self._board, self._study.folder)
                for folder, message in self._cluster.messages(POLL_S):
                    self._hear(self._running[folder], message)
        except KeyboardInterrupt:
            self._stop_all()
            raise
        return self._over.pop(task.folder)

    def close(self) -> None:
        """Kill what still runs: nothing, unless there was an error."""
        if self._running:
            self._cluster.cancel(at_once=True)
            self._cluster.forget()

    def _order(self, task: Task) -> dict[str, Any]:
        """Return the order for a run."""
        study = self._study.folder
        order = order_of(task, dump_yaml(task.spec), study, self._token, self._cluster.n_cpus)
        names = {"model": task.spec.model.name, "data": task.spec.data.name}
        order["paths"] = {w: n for w, n in names.items() if expanded(n).exists()}
        if task.adapter and not self._all_see:
            order["adapter_files"] = read_files(study / task.adapter)
        return order

    def _hear(self, run: _Remote, message: dict[str, Any]) -> None:
        """Take a message of a run."""
        folder = self._study.folder / run.task.folder
        match message["kind"]:
            case "began":
                self._began(run, message)
            case "metrics":
                (folder / METRICS).write_bytes(message["tail"])
            case "ended":
                self._take_files(folder, message)
                where = f" on {run.host}" if run.host else ""
                outcome = self._end(run.task, message["code"], run.before_s, run.now_s, where)
                self._finish(run, self._checked(run, outcome))
            case "lost":
                self._lost(run, message["reason"])
            case "refused" | "failed":
                self._fail(run, message["reason"])
            case "cancelled":
                self._cancelled(run)

    def _began(self, run: _Remote, message: dict[str, Any]) -> None:
        run.start_s, run.host = time.monotonic(), message["host"]
        if not message["resumed"]:
            run.before_s = 0.0
        about = {"load_before": message["load"], "host": run.host, "machine": message["machine"]}
        self._about[run.task.folder] = about
        self._board.start(run.task)
        self._record(run.task, Outcome("running"), run.before_s)
        how = "goes on" if message["resumed"] else "begins"
        self._view.say(f"{run.task.folder} {how} on {run.host}")

    def _take_files(self, folder: Path, message: dict[str, Any]) -> None:
        if not message["files"]:
            return
        with suppress(OSError):
            (folder / METRICS).unlink()
        unpack(message["files"], folder)
        if message["left_out"]:
            names = ", ".join(message["left_out"])
            self._view.say(f"{folder.name}: too large to be sent, and gone: {names}")

    def _lost(self, run: _Remote, reason: str) -> None:
        """Begin a lost run again, where that did not happen too often."""
        run.n_lost += 1
        if run.n_lost > MOST_LOST:
            self._fail(run, f"it was lost {run.n_lost} times: {reason}")
            return
        where = run.host or "its machine"
        self._view.say(f"{run.task.folder} was lost on {where} ({reason}); it begins again")
        run.before_s, run.start_s = run.before_s + run.now_s, None
        self._board.wait(run.task)
        self._cluster.start(run.task.folder, self._order(run.task))

    def _fail(self, run: _Remote, reason: str) -> None:
        where = f" on {run.host}" if run.host else ""
        self._view.say(f"{run.task.folder} failed{where}: {reason}")
        self._finish(run, self._note(run.task, Outcome("failed", reason), run.before_s + run.now_s))

    def _finish(self, run: _Remote, outcome: Outcome) -> None:
        del self._running[run.task.folder]
        self._over[run.task.folder] = outcome

    def _checked(self, run: _Remote, outcome: Outcome) -> Outcome:
        """Turn a run on other data or weights than the study's into one that failed."""
        if run.task.phase != "runs" or outcome.status != "done":
            return outcome
        facts, told = run_facts(self._study.folder / run.task.folder) or {}, self._study.facts
        weights = "base_weights_sample_sha256"
        if weights in facts and weights not in told:
            self._study.record(**{weights: facts[weights]})
        for name, what in (("data_sha256", "data"), (weights, "weights of the model")):
            if name in facts and told.get(name, facts[name]) != facts[name]:
                remove(self._study.folder / run.task.folder)
                reason = f"{run.host} has other {what} than the study"
                self._view.say(f"{run.task.folder}: {reason}")
                return self._note(run.task, Outcome("failed", reason), run.before_s + run.now_s)
        return outcome

    def _stop_all(self) -> None:
        """Let all runs stop after their present step; another interruption kills them."""
        self._view.say("stopping the runs after their present steps (again: at once)")
        self._cluster.cancel()
        until_s = time.monotonic() + STOPS_S
        try:
            while self._running and time.monotonic() < until_s:
                for folder, message in self._cluster.messages(POLL_S):
                    if message["kind"] == "lost":
                        message = {"kind": "cancelled"}
                    self._hear(self._running[folder], message)
        except KeyboardInterrupt:
            self._cluster.cancel(at_once=True)
        for run in list(self._running.values()):
            self._cancelled(run)
        self._cluster.forget()

    def _cancelled(self, run: _Remote) -> None:
        """Note a run that was stopped; one that never began leaves nothing."""
        outcome = Outcome("cancelled", STOPPED)
        if run.start_s is None:
            remove(self._study.folder / run.task.folder)
        else:
            self._note(run.task, outcome, run.before_s + run.now_s)
        self._finish(run, outcome)

    def _circumstances(self, task: Task, outcome: Outcome) -> dict[str, Any]:  # noqa: ARG002
        """Return where the run is and its machine's load when it began."""
        known = self._study.facts["runs"].get(task.folder, {})
        before = {name: known[name] for name in ("load_before", "host", "machine") if name in known}
        return {"load_before": None, **before, **self._about.get(task.folder, {})}
