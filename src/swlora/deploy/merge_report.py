"""Where the reports of merges and exports lie, and of which adapter a merged model was made."""

from pathlib import Path

from swlora.bounded_read import UnreadableError, read_json_object

MERGE_REPORT = "swlora-merge.json"


def gguf_report(path: Path) -> Path:
    """Return where the report of a GGUF file lies."""
    return path.with_name(f"{path.name}.report.json")


def merged_adapter_sha256(model: Path) -> str | None:
    """Return the hash of the adapter's weights that were merged into the model in a folder.

    None where nothing was merged, or by an older version, which did not note it.
    """
    try:
        noted = read_json_object(model / MERGE_REPORT).get("adapter_sha256")
    except UnreadableError:
        return None
    return noted if isinstance(noted, str) else None
