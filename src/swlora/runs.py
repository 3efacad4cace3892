"""The run folder: the only owner of the on-disk format.

    config.yaml     the resolved configuration        metrics.jsonl   one line a report, appended
    run.json        status, seed, versions, facts     result.json     what came out
    checkpoint/     the newest complete snapshot      adapter/        a standard PEFT adapter

Status is running, done, failed (with the reason) or cancelled. Every file but metrics.jsonl is
replaced atomically. A snapshot counts only when its manifest, written last, matches its bytes;
it goes when the run is done.
"""

import json
import os
import platform
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from swlora.bounded_read import UnreadableError, parse_json, read_bounded
from swlora.config import RunSpec, dump_yaml, load_spec
from swlora.errors import RunFailedError, UserError
from swlora.files import check_writable, read_json, write_json, write_text
from swlora.result_json import as_json
from swlora.work_folder import Status, WorkFolder, facts_of_now, read_facts

DEFAULT_PARENT = Path("runs")
METRICS = "metrics.jsonl"
CHECKSUM = "crc32"  # the last value of a line
MAX_METRICS_BYTES = 1 << 30  # of some million steps
RESUMABLE = ("train", "train-eval")


class Run(WorkFolder):
    """One run folder, used as a context manager that records how the run ended.

    A run is prepared, which writes nothing, and begins when its work does: a mistake that shows
    before that leaves no folder. While it is entered and has begun, no other process can enter the
    same folder (UserError).
    """

    work: ClassVar[str] = "run"
    file_name: ClassVar[str] = "run.json"
    status_after_error: ClassVar[Status] = "failed"

    def __init__(self, folder: Path, facts: dict[str, Any], spec: RunSpec) -> None:
        super().__init__(folder, facts)
        self.has_begun = False
        self._spec = spec
        self._is_named = True  # by the user; else a fresh folder is taken when the run begins
        self._start_s = time.perf_counter()
        self._is_entered = False

    @classmethod
    def prepare(cls, folder: Path | None, spec: RunSpec, command: str) -> Self:
        """Return a run that is to begin in `folder`, or in a fresh one under runs/ for None.

        Raises UserError where that would overwrite something or cannot be written.
        """
        check_writable(folder or DEFAULT_PARENT, "--output")
        if folder is not None:
            _check_free(folder)
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
            return
        if self._is_named:
            _make(self.folder, exist_ok=True)
        else:
            self.folder = _made_default_folder(self.facts["command"])
        if self._is_entered:
            self._take()
        _check_free(self.folder)
        write_text(self.folder / "config.yaml", dump_yaml(spec or self._spec))
        self.has_begun = True
        self._save()

    @classmethod
    def reopen(cls, folder: Path, command: str) -> tuple[Self, RunSpec]:
        """Open an unfinished run of `command` to continue it; UserError where there is none."""
        if not (folder / "run.json").exists():
            raise UserError(f"{folder} holds no run to resume")
        facts = read_run(folder)
        if facts["status"] == "done":
            raise UserError(_nothing_to_resume(folder))
        if facts["command"] != command:
            raise UserError(f"{folder} holds a run of {facts['command']}, not of {command}")
        spec = load_spec(folder / "config.yaml", {})
        facts |= {"status": "running", "resumed": facts.get("resumed", 0) + 1}
        run = cls(folder, facts, spec)
        run.has_begun = True
        return run, spec

    @property
    def checkpoint(self) -> Path:
        """The folder of the snapshot."""
        return self.folder / "checkpoint"

    def add_timing(self, name: str, seconds: float) -> None:
        """Add `seconds` to the named share of the run's time."""
        timings = self.facts["timings_s"]
        timings[name] = round(timings.get(name, 0.0) + seconds, 3)
        self._save()

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; RunFailedError where the disk is full."""
        line = _metrics_line(values)
        path = self.folder / METRICS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise RunFailedError(f"cannot write {path}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Have metrics.jsonl on the disk before a checkpoint says that its steps are done."""
        path = self.folder / METRICS
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return read_metrics(self.folder)

    def truncate_metrics(self, after_step: int) -> None:
        """Drop metric lines of steps after `after_step`, which a resumed run does again."""
        kept = [row for row in read_metrics(self.folder, strict=True) if row["step"] <= after_step]
        write_text(self.folder / METRICS, "".join(_metrics_line(row) + "\n" for row in kept))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Add to result.json what came out of the run, under names such as "train" and "eval"."""
        write_json(self.folder / "result.json", {**self.read_result(), **as_json(result)})

    def read_result(self) -> dict[str, Any]:
        """Return what came out so far; empty where nothing did."""
        return read_result(self.folder)

    def _save(self) -> None:
        if self.has_begun:
            super()._save()

    def __enter__(self) -> Self:
        self._is_entered = True
        if self.has_begun:
            self._take()
            try:
                if read_run(self.folder)["status"] == "done":  # since this process read of it
                    raise UserError(_nothing_to_resume(self.folder))
                self._record_start()
            except BaseException:
                self._lock.release()
                raise
        return self

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self._note_error(error)
        else:
            self.begin()  # which fails where another run has taken the folder
            self.facts["status"] = "done"
            shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.add_timing("total", time.perf_counter() - self._start_s)


def started_s(facts: Mapping[str, Any]) -> float:
    """Return when a run began, by its run.json, in seconds since the epoch."""
    return datetime.fromisoformat(facts["started_at"]).timestamp()


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json; UserError where the folder is no run."""
    return read_facts(folder / Run.file_name, ("status", "command"))


def read_result(folder: Path) -> dict[str, Any]:
    """Read result.json; empty where nothing came out so far."""
    path = folder / "result.json"
    return read_json(path) if path.exists() else {}


def read_metrics(folder: Path, *, strict: bool = False) -> list[dict[str, Any]]:
    """Read metrics.jsonl, empty before the first step, without lines that are torn or damaged.

    With `strict`, raises RunFailedError where the file is there and cannot be read whole.
    """
    path = folder / METRICS
    try:
        content, is_whole = read_bounded(path, MAX_METRICS_BYTES, follow_links=False)
    except UnreadableError as error:
        if strict and os.path.lexists(path):
            raise RunFailedError(f"{path} cannot be read: {error}") from error
        return []
    if strict and not is_whole:
        raise RunFailedError(f"{path} is longer than {MAX_METRICS_BYTES:,} bytes")
    return parse_metrics(content.splitlines())


def parse_metrics(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return the reports in lines of metrics.jsonl, without those that are torn or damaged."""
    rows = []
    for line in lines:
        try:
            row = parse_json(line)
        except UnreadableError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append((row.pop(CHECKSUM, None), row))
    is_older = all(noted is None for noted, _ in rows)  # older runs have no checksums
    return [row for noted, row in rows if is_older or noted == _checksum(row)]


def _metrics_line(values: Mapping[str, Any]) -> str:
    return json.dumps({**values, CHECKSUM: _checksum(values)}, allow_nan=False)


def _checksum(values: Mapping[str, Any]) -> int:
    """Return the crc32 of a report as JSON: its names, their order, and every digit."""
    return zlib.crc32(json.dumps(values).encode())


def _nothing_to_resume(folder: Path) -> str:
    return f"the run in {folder} is done; there is nothing to resume"


def _check_free(folder: Path) -> None:
    """Refuse a folder with a run, unless that run came to nothing and left nothing."""
    if not (folder / "run.json").exists():
        if (folder / "config.yaml").exists():
            raise UserError(
                f"{folder} holds a config.yaml of something else; choose another --output"
            )
        return
    facts = read_run(folder)
    left = {path.name for path in folder.iterdir()} - {"run.json", "config.yaml"}
    if facts["status"] in ("failed", "cancelled") and not left:
        return
    can_resume = facts["status"] != "done" and facts["command"] in RESUMABLE
    raise UserError(
        f"{folder} already holds a run ({facts['status']}); choose another --output"
        + (" or continue it with --resume" if can_resume else "")
    )


def default_folder(command: str) -> Path:
    """Return a fresh folder name under runs/ for a command that was given no --output."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = DEFAULT_PARENT / f"{command}-{stamp}"
    suffix = 1
    while folder.exists():
        suffix += 1
        folder = DEFAULT_PARENT / f"{command}-{stamp}-{suffix}"
    return folder


def _made_default_folder(command: str) -> Path:
    """Make and return a default folder that no other process has taken."""
    while True:
        folder = default_folder(command)
        with suppress(FileExistsError):
            _make(folder, exist_ok=False)
            return folder


def _make(folder: Path, *, exist_ok: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot make {folder}: {error.strerror}; choose another --output"
        ) from error
