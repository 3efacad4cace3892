"""The one child process that works for the page: a training, or what is made of an adapter.

It outlives the server that started it. A file in the folder of runs is locked for as long as the
child lives, since the child is handed the lock; the file beside it says what the child does. So
whichever server looks at the folder finds the child, and no two start one.
"""

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from swlora.bounded_read import UnreadableError, read_tail
from swlora.errors import RunFailedError, UserError
from swlora.files import read_json, write_json
from swlora.locks import is_locked, lock
from swlora.result_json import as_json, from_json
from swlora.study.one_process import LOG, start_process

LOCK, NOTE = ".page-work.lock", ".page-work.json"
MAX_NOTE_BYTES = 64 << 10
MAX_LOG_BYTES = 8 << 10  # of the end of a log
WITHOUT_KEY = {"SWLORA_API_KEY": ""}  # a child needs no secret of the server


@dataclass(frozen=True)
class Job:
    """What the child does: train, merge or gguf; in which run; since when, in s since the epoch."""

    kind: str
    run: str
    pid: int
    started_s: float
    log_from_byte: int = 0  # of the run's log; what stands before is of other work
    is_stopping: bool = False


class Worker:
    """Starts, finds and stops the child that works in the folder of runs `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mutex = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._told: Job | None = None  # to stop; on a full disk the note does not say so

    def now(self) -> Job | None:
        """Return what the child does; None where there is none."""
        with self._mutex:
            return self._last() if self._is_at_work() else None

    def last(self) -> Job | None:
        """Return what the child does, or did last."""
        with self._mutex:
            return self._last()

    def start(self, kind: str, run: str, command: list[str]) -> Job:
        """Start a child that works in the folder of a run; UserError where one is at work.

        Raises RunFailedError where no process can be started, such as on a full disk.
        """
        with self._mutex:
            folder = self._root / run
            try:
                held = (
                    None if self._is_at_work() else lock(self._root / LOCK, alone=True, make=True)
                )
                if held is None:
                    raise UserError(f"{said_of(self._last())} is at work: one at a time")
                with held:
                    n_bytes = _n_bytes(folder / LOG)
                    child = start_process(
                        command, folder, WITHOUT_KEY, descriptors=held.descriptors
                    )
            except OSError as error:
                raise RunFailedError(f"it cannot be started: {error.strerror}") from error
            self._child = child
            job = Job(kind, run, child.pid, time.time(), n_bytes)
            try:
                write_json(self._root / NOTE, as_json(job))
            except BaseException:
                child.kill()
                raise
            return job

    def stop(self, run: str, *, at_once: bool) -> None:
        """Ask the child to end after its present step, or kill it; UserError for another's run.

        It is asked once: a training takes a second signal for "at once, without a checkpoint".
        """
        with self._mutex:
            job = self._last() if self._is_at_work() else None
            if job is None or job.run != run:
                raise UserError("nothing is at work in this run")
            if not self._is_ours(job):
                raise UserError("its process cannot be found; it may have just ended")
            if job.is_stopping and not at_once:
                return
            with suppress(ProcessLookupError):
                if at_once:  # its session, with what it has started, such as llama.cpp
                    os.killpg(job.pid, signal.SIGKILL)
                else:
                    os.kill(job.pid, signal.SIGTERM)
            self._told = job
            with suppress(RunFailedError):  # a full disk: it was told to stop all the same
                write_json(self._root / NOTE, as_json(replace(job, is_stopping=True)))

    def _is_at_work(self) -> bool:
        if self._child is not None and self._child.poll() is None:  # and is reaped if not
            return True
        return is_locked(self._root / LOCK)

    def _last(self) -> Job | None:
        try:
            job = from_json(Job, read_json(self._root / NOTE, max_bytes=MAX_NOTE_BYTES))
        except (UserError, KeyError, ValueError, TypeError):
            return None
        return replace(job, is_stopping=True) if job == self._told else job

    def _is_ours(self, job: Job) -> bool:
        """Say whether the process of a note is the one that it was written of."""
        try:
            return str(self._root / job.run) in " ".join(psutil.Process(job.pid).cmdline())
        except (psutil.Error, ValueError, OverflowError):
            return False


def said_of(job: Job | None) -> str:
    """Return what a child does, in a few words."""
    if job is None:
        return "something"
    what = {"train": "a training", "merge": "a merge", "gguf": "an export"}
    return f"{what.get(job.kind, 'something')} in {job.run}"


def last_line(folder: Path, from_byte: int = 0) -> str:
    """Return the last line that a child has written into the log in a folder; "" for none.

    What stands before `from_byte` is not looked at.
    """
    try:
        text = read_tail(folder / LOG, MAX_LOG_BYTES, from_byte).decode("utf-8", "replace")
    except UnreadableError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500].removeprefix("swlora: ") if lines else ""


def _n_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
