"""Where the project keeps what it makes for itself outside of run folders."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: $SWLORA_CACHE, else $XDG_CACHE_HOME/swlora, else ~/.cache/swlora."""
    chosen = os.environ.get("SWLORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "swlora"
