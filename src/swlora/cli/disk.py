"""How ages look, and what a run has left on the disk."""

import sys
from pathlib import Path

from swlora import caches
from swlora.disk_space import size

WORTH_SAYING_BYTES = 16_000_000


def ago(seconds: float) -> str:
    """Write how long ago something was, in its largest unit."""
    for unit, unit_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {unit} ago"
    return "just now"


def say_what_is_left(folder: Path, since_s: float) -> None:
    """Say on stderr what a run has left on the disk, where that is more than some megabytes."""
    try:
        run_bytes, cache_bytes = caches.left_by_run(folder, since_s)
    except OSError:  # a remark is no reason to fail
        return
    if run_bytes + cache_bytes < WORTH_SAYING_BYTES:
        return
    said = f"on the disk: {size(run_bytes)} in {folder}"
    if cache_bytes:
        said += f", {size(cache_bytes)} in the cache (swlora cache lists and clears it)"
    print(said, file=sys.stderr)
