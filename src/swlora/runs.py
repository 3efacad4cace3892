"""The run folder: the only owner of the on-disk format.

    config.yaml     the resolved configuration        metrics.jsonl   one line a report, appended
    run.json        status, seed, versions, facts     result.json     what came out
    checkpoint/     the newest complete snapshot      adapter/        a standard PEFT adapter

Status is running, done, failed (with the reason) or cancelled. Every file but metrics.jsonl is
replaced atomically. A snapshot counts only when its manifest, written last, matches its bytes;
it goes when the run is done.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from swlora.config import RunSpec, dump_yaml, load_spec
from swlora.errors import RunFailedError, UserError
from swlora.files import atomic_path, check_writable, write_json, write_text
from swlora.result_json import as_json

if TYPE_CHECKING:
    from torch import Tensor

Status = Literal["running", "done", "failed", "cancelled"]
DEFAULT_PARENT = Path("runs")
RESUMABLE = ("train", "train-eval")
PACKAGES = ("swlora", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


class Run:
    """One run folder, used as a context manager that records how the run ended.

    A run is prepared, which writes nothing, and begins when its work does: a mistake that shows
    before that leaves no folder. While it is entered and has begun, no other process can enter the
    same folder (UserError).
    """

    def __init__(self, folder: Path, facts: dict[str, Any], spec: RunSpec) -> None:
        self.folder = folder
        self.facts = facts
        self.has_begun = False
        self._spec = spec
        self._is_named = True  # by the user; else a fresh folder is taken when the run begins
        self._start_s = time.perf_counter()
        self._is_entered = False
        self._lock: int | None = None

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
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "packages": package_versions(),
            "python": platform.python_version(),
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
            self._lock = lock_folder(self.folder)
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
            raise UserError(f"the run in {folder} is done; there is nothing to resume")
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

    def record(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.facts.update(facts)
        self._save()

    def record_source(self, **facts: Any) -> None:
        """Record what the run works on; UserError where a resumed run would work on another."""
        for name, now in facts.items():
            before = self.facts.get(name, now)
            if before != now:
                raise UserError(f"this run cannot go on: {name} was {before} and is now {now}")
        self.record(**facts)

    def add_timing(self, name: str, seconds: float) -> None:
        """Add `seconds` to the named share of the run's time."""
        timings = self.facts["timings_s"]
        timings[name] = round(timings.get(name, 0.0) + seconds, 3)
        self._save()

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; RunFailedError where the disk is full."""
        line = json.dumps(values, allow_nan=False)
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise RunFailedError(f"cannot write {path}: {error.strerror or error}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return read_metrics(self.folder)

    def truncate_metrics(self, after_step: int) -> None:
        """Drop metric lines of steps after `after_step`, which a resumed run does again."""
        kept = [row for row in read_metrics(self.folder) if row["step"] <= after_step]
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Add to result.json what came out of the run, under names such as "train" and "eval"."""
        write_json(self.folder / "result.json", {**self.read_result(), **as_json(result)})

    def read_result(self) -> dict[str, Any]:
        """Return what came out so far; empty where nothing did."""
        path = self.folder / "result.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def _save(self) -> None:
        if self.has_begun:
            write_json(self.folder / "run.json", self.facts)

    def __enter__(self) -> Self:
        self._is_entered = True
        if self.has_begun:
            self._lock = lock_folder(self.folder)
            self._check_unfinished()
            self._save()
        return self

    def _check_unfinished(self) -> None:
        """Refuse a run that another process ended after this one had read of it."""
        if read_run(self.folder)["status"] == "done":
            if self._lock is not None:
                os.close(self._lock)
            raise UserError(f"the run in {self.folder} is done; there is nothing to resume")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status: Status = "done"
        if error is not None:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "cancelled" if stopped else "failed"
            self.facts["reason"] = f"{type(error).__name__}: {error}".strip(": ")
        else:
            self.facts.pop("reason", None)
            shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.facts["status"] = status
        try:
            if error is None:
                self.begin()
            self.add_timing("total", time.perf_counter() - self._start_s)
        finally:
            if self._lock is not None:
                os.close(self._lock)


def started_s(facts: Mapping[str, Any]) -> float:
    """Return when a run began, by its run.json, in seconds since the epoch."""
    return datetime.fromisoformat(facts["started_at"]).timestamp()


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json; UserError where the folder is no run."""
    try:
        facts = dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
        facts["status"], facts["command"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} holds no readable run.json") from error
    return facts


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, empty before the first step; a torn last line, as a kill may leave it,
    is dropped.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


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


def lock_folder(folder: Path) -> int | None:
    """Return a descriptor that locks the folder until it is closed, at the latest by the end of
    the process; None where the system has no such locks. UserError where another one holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise UserError(f"another process is at work in {folder}") from error
        return None
    return descriptor


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


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def save_snapshot(folder: Path, tensors: dict[str, "Tensor"], values: dict[str, Any]) -> None:
    """Replace the snapshot in `folder` by `tensors` and JSON `values`; the old one stays until
    the new one is complete.

    The bytes go to a name of their own, then the manifest (name, sha256) is renamed into place,
    then the previous file is removed: a kill at any moment leaves a whole snapshot.
    Raises RunFailedError where the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    numbers = [int(path.stem.partition("-")[2]) for path in folder.glob("state-*.safetensors")]
    data_path = folder / f"state-{max(numbers, default=0) + 1}.safetensors"
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"values": json.dumps(values, allow_nan=False)}
    with atomic_path(data_path) as scratch:
        try:
            save_file(contents, scratch, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
    write_json(folder / "manifest.json", {"file": data_path.name, "sha256": _sha256(data_path)})
    for stale in folder.glob("state-*.safetensors"):
        if stale != data_path:
            stale.unlink()


def load_snapshot(folder: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]] | None:
    """Return (tensors, values) of the snapshot in `folder`, or None where none was completed.

    Raises RunFailedError where its bytes are not those that were saved.
    """
    from safetensors import safe_open

    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        path = folder / manifest["file"]
        whole = path.is_file() and _sha256(path) == manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise RunFailedError(f"the checkpoint {path} is damaged; start again in another --output")
    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()["values"])
        return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
