"""What was made of a run's adapter, and whether it is of the adapter as it is now.

A run may go on after its adapter was merged: the merged model and its GGUF files stay as they were.
Their reports have the hash of the adapter's weights, which the adapter's own notes have, too. Where
a report of an older version has none, the dates decide.
"""

from pathlib import Path
from typing import Any, Literal

from swlora.adapters.saved import DIGESTS, FACTS, WEIGHTS
from swlora.bounded_read import UnreadableError, read_json_object
from swlora.deploy.merge_report import MERGE_REPORT, gguf_report

MERGED = "merged"
GGUF_TYPES = ("q8_0", "f16")
State = Literal["missing", "old", "current"]
MAX_REPORT_BYTES = 4 << 20


def merged_path(folder: Path) -> Path:
    """Return where the merged model of a run lies."""
    return folder / MERGED


def gguf_path(folder: Path, kind: str) -> Path:
    """Return where the merged model of a run is written as a GGUF file."""
    return folder / f"{MERGED}-{kind}.gguf"


def merged_state(folder: Path) -> State:
    """Say how the merged model of a run stands to its adapter."""
    merged = merged_path(folder)
    if not merged.is_dir():
        return "missing"
    return _state(folder, merged, merged / MERGE_REPORT, "adapter_sha256")


def gguf_state(folder: Path, kind: str) -> State:
    """Say how a GGUF file of the merged model stands to the run's adapter."""
    path = gguf_path(folder, kind)
    if not path.is_file() or path.is_symlink():
        return "missing"
    return _state(folder, path, gguf_report(path), "merged_adapter_sha256")


def _state(folder: Path, made: Path, report: Path, name: str) -> State:
    adapter = folder / "adapter"
    of, now = _read(report).get(name), _read(adapter / FACTS).get(DIGESTS)
    digest = now.get(WEIGHTS) if isinstance(now, dict) else None
    if isinstance(of, str) and isinstance(digest, str):
        return "current" if of == digest else "old"
    try:
        return "current" if _written_s(report, made) >= _written_s(adapter / WEIGHTS) else "old"
    except OSError:  # there is no adapter
        return "old"


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, max_bytes=MAX_REPORT_BYTES, follow_links=False)
    except UnreadableError:
        return {}


def _written_s(*paths: Path) -> float:
    """Return when the first of the paths that is there was written; OSError for none."""
    path = next((path for path in paths if path.exists()), paths[-1])
    return path.stat().st_mtime
