"""Where the reports of merges and exports lie, and of which adapter a merged model was made."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.bounded_read import MAX_BYTES
from swlora.errors import UserError
from swlora.models.model_folder import read_model_json

if TYPE_CHECKING:
    from swlora.models.load import LoadedModel

MERGE_REPORT = "swlora-merge.json"


def gguf_report(path: Path) -> Path:
    """Return where the report of a GGUF file lies."""
    return path.with_name(f"{path.name}.report.json")


def read_report(path: Path) -> dict[str, Any]:
    """Return what a report says, {} where there is none; UserError where it cannot be read."""
    return read_model_json(path, max_bytes=MAX_BYTES) if path.exists() else {}


def merged_adapter_sha256(model: Path) -> str | None:
    """Return the hash of the adapter's weights that were merged into the model in a folder.

    None where nothing was merged, or by an older version, which did not note it.
    """
    try:
        noted = read_report(model / MERGE_REPORT).get("adapter_sha256")
    except UserError:
        return None
    return noted if isinstance(noted, str) else None


def was_trained_on_chats(loaded: "LoadedModel") -> bool:
    """Say whether a merged model's adapter was trained on chats; True for any other model."""
    from swlora.models.local_files import local_file

    report = local_file(loaded, MERGE_REPORT)
    adapter = read_report(report).get("adapter") if report else None
    return bool(adapter.get("is_chat", True)) if isinstance(adapter, dict) else True
