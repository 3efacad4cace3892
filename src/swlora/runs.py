"""The run folder: the only owner of the on-disk format.

    config.yaml     the resolved configuration        metrics.jsonl   one line a report, appended
    run.json        status, seed, versions, facts     result.json     what came out
    checkpoint/     the newest complete snapshot      adapter/        a standard PEFT adapter

Status is running, done, failed (with the reason) or cancelled. Every file but metrics.jsonl is
replaced atomically. A snapshot counts only when its manifest, written last, matches its bytes.
"""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from swlora.config import RunSpec, dump_yaml, load_spec
from swlora.errors import RunFailedError, UserError
from swlora.files import atomic_path, write_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

Status = Literal["running", "done", "failed", "cancelled"]
PACKAGES = ("swlora", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


class Run:
    """One run folder, used as a context manager that records how the run ended."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self._start_s = time.perf_counter()

    @classmethod
    def create(cls, folder: Path, spec: RunSpec, command: str) -> Self:
        """Start a run in `folder`; UserError where it already holds one."""
        if (folder / "run.json").exists():
            status = read_run(folder)["status"]
            raise UserError(
                f"{folder} already holds a run ({status}); choose another --output"
                + ("" if status == "done" else " or continue it with --resume")
            )
        run = cls(
            folder,
            {
                "status": "running",
                "command": command,
                "seed": spec.seed,
                "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "packages": package_versions(),
                "python": platform.python_version(),
                "machine": platform.machine(),
                "timings_s": {},
            },
        )
        write_text(folder / "config.yaml", dump_yaml(spec))
        run._save()
        return run

    @classmethod
    def reopen(cls, folder: Path) -> tuple[Self, RunSpec]:
        """Open an unfinished run to continue it; UserError where there is none."""
        if not (folder / "run.json").exists():
            raise UserError(f"{folder} holds no run to resume")
        facts = read_run(folder)
        if facts["status"] == "done":
            raise UserError(f"the run in {folder} is done; there is nothing to resume")
        spec = load_spec(folder / "config.yaml", {})
        run = cls(folder, facts)
        run.record(status="running", resumed=facts.get("resumed", 0) + 1)
        return run, spec

    def record(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.facts.update(facts)
        self._save()

    def add_timing(self, name: str, seconds: float) -> None:
        """Add `seconds` to the named share of the run's time."""
        timings = self.facts["timings_s"]
        timings[name] = round(timings.get(name, 0.0) + seconds, 3)
        self._save()

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        line = json.dumps(values, allow_nan=False)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def truncate_metrics(self, after_step: int) -> None:
        """Drop metric lines of steps after `after_step`, which a resumed run does again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [row for row in read_metrics(self.folder) if row["step"] <= after_step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json: what came out of the run."""
        write_json(self.folder / "result.json", dict(result))

    def _save(self) -> None:
        write_json(self.folder / "run.json", self.facts)

    def __enter__(self) -> Self:
        return self

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
        self.facts["status"] = status
        self.add_timing("total", time.perf_counter() - self._start_s)


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json; UserError where the folder is no run."""
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable run.json") from error
    return dict(facts)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a torn last line, as a kill may leave it, is dropped."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def default_folder(command: str) -> Path:
    """Return a fresh folder name under runs/ for a command that was given no --output."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path("runs") / f"{command}-{stamp}"
    suffix = 1
    while folder.exists():
        suffix += 1
        folder = Path("runs") / f"{command}-{stamp}-{suffix}"
    return folder


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

    The bytes go to a name of their own, then the manifest (name, size, sha256, values) is renamed
    into place, then the previous file is removed: a kill at any moment leaves a whole snapshot.
    """
    from safetensors.torch import save_file

    previous = _manifest(folder)
    n_saved = 1 + (previous["n_saved"] if previous else 0)
    data_path = folder / f"state-{n_saved}.safetensors"
    with atomic_path(data_path) as scratch:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch)
    manifest = {
        "n_saved": n_saved,
        "file": data_path.name,
        "sha256": _sha256(data_path),
        "values": values,
    }
    write_json(folder / "manifest.json", manifest)
    for stale in folder.glob("state-*.safetensors"):
        if stale != data_path:
            stale.unlink()


def load_snapshot(folder: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]] | None:
    """Return (tensors, values) of the snapshot in `folder`, or None where none was completed.

    Raises RunFailedError where its bytes are not those that were saved.
    """
    from safetensors.torch import load_file

    manifest = _manifest(folder)
    if manifest is None:
        return None
    path = folder / manifest["file"]
    if not path.is_file() or _sha256(path) != manifest["sha256"]:
        raise RunFailedError(f"the checkpoint {path} is damaged; start again in another --output")
    return load_file(path), dict(manifest["values"])


def remove_snapshot(folder: Path) -> None:
    """Remove the snapshot of a finished run."""
    shutil.rmtree(folder, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RunFailedError(f"{path} is damaged; start again in another --output") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
