"""A folder that a server was given, walked within bounds; links are not followed."""

import os
from collections.abc import Iterator
from pathlib import Path


def walk(
    root: Path, *, max_depth: int, max_folders: int, aside: Path | None = None
) -> Iterator[tuple[str, Path, list[str]]]:
    """Yield (name, folder, its files) of `root` and what lies below it, in the names' order.

    A name is the path below `root`, with "/" between its parts. Folders of odd names are left out,
    and so is the folder `aside`.
    """
    n_seen = 0
    for path, folders, files in os.walk(root, followlinks=False):
        n_seen += 1
        if n_seen > max_folders:
            return
        folder = Path(path)
        inner = folder.relative_to(root)
        is_end = len(inner.parts) >= max_depth or folder == aside
        folders[:] = [] if is_end else sorted(name for name in folders if is_plain(name))
        if folder == aside or folder.is_symlink():
            continue
        yield inner.as_posix() if inner.parts else root.resolve().name, folder, files


def is_plain(name: str) -> bool:
    """Say whether the name of a file or folder is one that can be shown, and is not hidden."""
    return name.isprintable() and not name.startswith(".") and len(name) <= 100
