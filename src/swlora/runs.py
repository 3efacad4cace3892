"""The run folder: the only owner of the on-disk format.

    config.yaml     the resolved configuration        metrics.jsonl   one line a report, appended
    run.json        status, seed, versions, facts     result.json     what came out
    checkpoint/     the newest complete snapshots     adapter/, best/ standard PEFT adapters
    samples.jsonl   texts on the way                  config.original.yaml  settings before changes

Status is running, done, failed (with the reason) or cancelled. Every file but metrics.jsonl is
replaced atomically. A run has begun when it has both run.json and, written after it, config.yaml.
A snapshot counts only when its manifest, written last, matches its bytes; those of a training that
is done stay for more epochs, or go. Whoever opens a run puts right what a kill left.
"""

import os
import platform
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from swlora.config import RunSpec, dump_yaml
from swlora.errors import RunFailedError, UserError
from swlora.files import (
    check_writable,
    read_json,
    remove_files,
    write_json,
    write_text,
)
from swlora.idle_settings import check_effects
from swlora.locks import lock_folder
from swlora.metrics_file import append_metrics, read_metrics, sync_metrics, truncate_metrics
from swlora.result_json import as_json
from swlora.resumption import Resumption, Told, check_resumable, nothing_to_resume
from swlora.run_place import (
    ADAPTERS,
    CHECKPOINT,
    CONFIG,
    DEFAULT_PARENT,
    NEEDED,
    RESUMABLE,
    RUN,
    STOPPED,
    check_free,
    default_folder,
    made_default_folder,
    make_run_folder,
    tidy,
)
from swlora.run_settings import Change, flat
from swlora.work_folder import Status, WorkFolder, facts_of_now, read_facts

RESULT = "result.json"


class Run(WorkFolder):
    """One run folder, used as a context manager that records how the run ended.

    A run is prepared, which writes nothing, and begins when its work does: a mistake that shows
    before that leaves no folder. While it is entered and has begun, no other process can enter the
    same folder (UserError).
    """

    work: ClassVar[str] = "run"
    file_name: ClassVar[str] = RUN
    status_after_error: ClassVar[Status] = "failed"

    def __init__(self, folder: Path, facts: dict[str, Any], spec: RunSpec) -> None:
        super().__init__(folder, facts)
        self.has_begun = False
        self._spec = spec
        self._resumption: Resumption | None = None  # where it goes on
        self._is_named = True  # by the user; else a fresh folder is taken when the run begins
        self._start_s = time.perf_counter()
        self._is_entered = self._was_made_again = False
        self._result: dict[str, Any] = {}  # that was written

    @classmethod
    def prepare(cls, folder: Path | None, spec: RunSpec, command: str) -> Self:
        """Return a run that is to begin in `folder`, or in a fresh one under runs/ for None.

        Raises UserError where that would overwrite something or cannot be written.
        """
        check_writable(folder or DEFAULT_PARENT, "--output")
        if folder is not None:
            check_free(folder)
        facts = {
            "status": "running",
            "command": command,
            "seed": spec.seed,
            **facts_of_now(),
            "machine": platform.machine(),
            "timings_s": {},
        }
        run = cls(folder or default_folder(command), facts, spec)
        run._is_named = folder is not None
        return run

    @classmethod
    def create(cls, folder: Path, spec: RunSpec, command: str) -> Self:
        """Prepare a run and begin it."""
        run = cls.prepare(folder, spec, command)
        run.begin()
        return run

    def begin(self, spec: RunSpec | None = None) -> None:
        """Make the folder, with `spec` (default: that of `prepare`) as the configuration.

        Does nothing where the run has begun. Raises UserError where another process was faster.
        """
        if self.has_begun:
            if self._resumption:
                self._spec = spec or self._spec
                self._resumption.write(self._spec, self._record_start)
            return
        if self._is_named:
            make_run_folder(self.folder, exist_ok=True)
        else:
            self.folder = made_default_folder(self.facts["command"])
        if self._is_entered:
            self._take()
        check_free(self.folder)
        tidy(self.folder, self.facts)
        # Of a run that came to nothing: not of this one
        remove_files([self.folder / CONFIG], "choose another --output")
        self._spec = spec or self._spec
        self.has_begun = True
        self._write_start()

    def _write_start(self) -> None:
        self.facts["settings"] = flat(self._spec)
        super()._save()
        write_text(self.folder / CONFIG, dump_yaml(self._spec))
        if self._result:
            write_json(self.folder / RESULT, self._result)

    def keep_place(self) -> bool:
        """Make the folder again where somebody removed or emptied it, with what came out so far.

        Says whether that was done since this was last asked: whatever is written here does it.
        Raises RunFailedError where another folder lies there, in which nothing is written.
        """
        self._make_again()
        was_made_again, self._was_made_again = self._was_made_again, False
        return was_made_again

    def _make_again(self) -> bool:
        """Make the folder again where it is not there as this run's; say whether that was done."""
        if not self.has_begun:
            return False
        is_there = self._lock.is_of(self.folder)
        if is_there and (self.folder / CONFIG).exists():
            return False
        if not is_there:
            if os.path.lexists(self.folder):
                raise RunFailedError(
                    f"{self.folder} was replaced while the run was at work in it: nothing is "
                    "written into what lies there now"
                )
            make_run_folder(self.folder, exist_ok=False)
            self._lock.release()
            self._take()
        self.facts["folder_made_again"] = self._was_made_again = True
        self._write_start()
        return True

    @classmethod
    def reopen(
        cls,
        folder: Path,
        command: str,
        flags: Mapping[str, Any] | None = None,
        forced: Told | None = None,
    ) -> tuple[Self, RunSpec]:
        """Lock a run of `command`, to be entered and continued; one that is done, with `flags`.

        See `Resumption` for `flags` and `forced`. Raises UserError where there is no such run,
        another process is at work in it, or a flag would do nothing.
        """
        if not (folder / cls.file_name).exists():
            raise UserError(f"{folder} holds no run to resume")
        held = lock_folder(folder)
        try:
            run, spec = cls._read_back(folder, command, dict(flags or {}), forced)
        except BaseException:
            held.release()
            raise
        run._lock = held
        return run, spec

    @classmethod
    def _read_back(
        cls, folder: Path, command: str, flags: dict[str, Any], forced: Told | None
    ) -> tuple[Self, RunSpec]:
        """Read the run in a locked folder, after putting right what a kill left there."""
        facts = read_run(folder)
        run = cls(folder, facts, RunSpec())
        run.has_begun = True
        tidy(folder, facts)
        if facts.pop(STOPPED, None) is not None:
            facts["status"] = "running"  # its steps are not all done
        result = read_result(folder) if facts["status"] == "done" else {}
        check_resumable(folder, facts, result, command, flags)
        run._resumption = Resumption(folder, facts, flags, forced)
        if facts["status"] == "done" and not run._resumption.leaves_it_done:  # flags as it had them
            raise UserError(nothing_to_resume(folder))
        run._spec = run._resumption.spec
        check_effects(command, run._spec, flags)
        return run, run._spec

    @property
    def checkpoint(self) -> Path:
        """The folder of the snapshot."""
        return self.folder / CHECKPOINT

    def changes_from(self, n_done: int) -> list[Change]:
        """Return the changes of settings so far, with those that hold from step `n_done` on."""
        return self._resumption.changes_from(n_done) if self._resumption else []

    def record_source(self, **facts: Any) -> None:
        """Record what is worked on; UserError, or told, where it was something else before."""
        if self._resumption and self._resumption.let_differ(facts):
            self.record(**facts)
        else:
            super().record_source(**facts)

    def add_timing(self, name: str, seconds: float) -> None:
        """Add `seconds` to the named share of the run's time."""
        timings = self.facts["timings_s"]
        timings[name] = round(timings.get(name, 0.0) + seconds, 3)
        self._save()

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; RunFailedError where the disk is full."""
        self._make_again()
        append_metrics(self.folder, values)

    def sync(self) -> None:
        """Have metrics.jsonl on the disk before a checkpoint says that its steps are done."""
        sync_metrics(self.folder)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return read_metrics(self.folder)

    def truncate_metrics(self, after_step: int) -> None:
        """Drop metric lines of steps after `after_step`, which a resumed run does again."""
        truncate_metrics(self.folder, after_step)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Add to result.json what came out of the run, under names such as "train" and "eval"."""
        self._make_again()
        whole = {**self.read_result(), **as_json(result)}
        write_json(self.folder / RESULT, whole)
        self._result = whole

    def read_result(self) -> dict[str, Any]:
        """Return what came out so far; empty where nothing did."""
        return read_result(self.folder)

    def note_end(self, error: BaseException) -> None:
        """Record an error that ends the process here and now; the lock goes with it."""
        self._note_error(error)
        self._save()

    def _save(self) -> None:
        if self._resumption and self._resumption.leaves_it_done:
            return
        if self.has_begun and not self._make_again():
            super()._save()

    def __enter__(self) -> Self:
        self._is_entered = True
        if self.has_begun:
            is_new = not self._lock.is_held
            if is_new:
                self._take()
            if self._resumption and self._resumption.leaves_it_done:
                return self  # until it is known that there is something to do
            try:
                if is_new and read_run(self.folder)["status"] == "done":  # by another process
                    raise UserError(nothing_to_resume(self.folder))
                self._record_start()
            except BaseException:
                self._lock.release()
                raise
        return self

    def _end(self, error: BaseException | None) -> None:
        if self._resumption and self._resumption.leaves_it_done:
            return  # there was nothing to do
        if error is not None:
            self._note_error(error)
        else:
            self.begin()  # which fails where another run has taken the folder
            self._check_whole()
            self.facts["status"] = "done"
        self.add_timing("total", time.perf_counter() - self._start_s)
        if error is None:  # the disk says so: what is needed to go on may go
            tidy(self.folder, self.facts)

    def _check_whole(self) -> None:
        """Refuse to call a training done whose adapter somebody removed after it was saved."""
        self._make_again()
        is_training = self.facts["command"] in RESUMABLE
        if is_training and self.facts.get("folder_made_again") and not self._has_adapter():
            error = RunFailedError(
                f"{self.folder} was removed while the run was at work, and with it the adapter "
                "that had been saved there: train again"
            )
            self._end(error)
            raise error

    def _has_adapter(self) -> bool:
        return (self.folder / ADAPTERS[0]).is_dir()


def started_s(facts: Mapping[str, Any]) -> float:
    """Return when a run began, by its run.json, in seconds since the epoch."""
    return datetime.fromisoformat(facts["started_at"]).timestamp()


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json; UserError where the folder is no run."""
    return read_facts(folder / RUN, NEEDED)


def read_result(folder: Path) -> dict[str, Any]:
    """Read result.json; empty where nothing came out so far."""
    path = folder / RESULT
    return read_json(path) if path.exists() else {}
