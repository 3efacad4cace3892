"""Where the project keeps what it makes for itself outside of run folders; what can be a path."""

import errno
import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: $SWLORA_CACHE, else $XDG_CACHE_HOME/swlora, else ~/.cache/swlora."""
    chosen = os.environ.get("SWLORA_CACHE")
    if chosen:
        return expanded(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "swlora"


def expanded(path: str | Path) -> Path:
    """Return a person's path with ~ as a home folder; where no such user is known, as it stands.

    `Path.expanduser` raises RuntimeError there.
    """
    return Path(os.path.expanduser(path))


def may_be_path(text: str | Path) -> bool:
    """Say whether a text could name a file: it holds no NUL, and is not too long for the system.

    To be asked before a person's text is looked for on the disk: `Path.is_file` and its like raise
    OSError for one that is too long. Other errors, such as of rights, are left to them.
    """
    try:
        os.lstat(text)
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    except ValueError:
        return False
    return True
