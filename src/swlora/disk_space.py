"""Space on disks, foreseen: what is about to be written is compared with what is free."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swlora.errors import UserError


@dataclass(frozen=True)
class Need:
    """What is about to be written, in words, and how many bytes of it at most."""

    what: str
    n_bytes: int


def size(n_bytes: float) -> str:
    """Write a number of bytes as a person does."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.{0 if n_bytes >= 10 * unit else 1}f} {name}"
    return f"{n_bytes:.0f} bytes"


def total_bytes(needs: Sequence[Need]) -> int:
    """Return the bytes of all needs together."""
    return sum(need.n_bytes for need in needs)


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def on_one_disk(folder: Path, other: Path) -> bool:
    """Say whether two folders, which need not exist yet, lie on one file system."""
    return _existing(folder).stat().st_dev == _existing(other).stat().st_dev


def check_space(folder: Path, needs: Sequence[Need], remedy: str) -> None:
    """Raise UserError, ending with `remedy`, where the disk of `folder` has no room for all needs.

    It names what is needed, by the parts, and what is free.
    """
    needed, free = total_bytes(needs), free_bytes(folder)
    if needed <= free:
        return
    parts = ", ".join(f"{size(need.n_bytes)} {need.what}" for need in needs if need.n_bytes)
    raise UserError(
        f"{folder} needs room for {size(needed)} ({parts}), and its disk has {size(free)} free; "
        f"{remedy}"
    )


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest above it that exists."""
    path = Path(os.path.abspath(folder))
    return next(place for place in (path, *path.parents) if place.exists())
