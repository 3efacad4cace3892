"""What lies in the cache folder: of which kind, how large, for whom, when used; and its removal.

    KIND      where                         in use while
    model     a folder with config.json     a process that loaded it lives (a lock on the folder)
    prefix    prefix/KEY/                   a training reads or writes it (a lock on its `lock`)
    english   english/KEY.json              never: it is read in one go
    scratch   .unpacking-*, .removed-*, ... it is younger than `SCRATCH_S`
    other     what swlora did not make      not known, so it goes only where its kind is named

An entry is removed under an exclusive lock, and under another name, so that nobody sees half of it.
"""

import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.errors import UserError
from swlora.locks import Lock, lock
from swlora.paths import cache_dir

PREFIX, ENGLISH = "prefix", "english"  # folders
ABOUT, LOCK = "about.json", "lock"  # files in a folder of the prefix cache
KEPT = ("model", PREFIX, ENGLISH)
MADE_HERE = (*KEPT, "scratch")
KINDS = (*MADE_HERE, "other")
SCRATCH_S = 3600.0
MAX_ABOUT_BYTES = 1 << 16
UNITS_S = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True)
class Entry:
    """One thing in the cache; `made_at` and `used_at` in seconds since the epoch."""

    kind: str
    path: Path
    n_bytes: int
    made_at: float
    used_at: float
    owner: str
    in_use: bool


def entries() -> list[Entry]:
    """Return what lies in the cache, by kind, the most recently used first."""
    root = cache_dir()
    found = []
    for kind, path in _places(root):
        try:
            found.append(_entry(kind, path))
        except FileNotFoundError:  # another process has just removed it
            continue
    return sorted(found, key=lambda e: (KINDS.index(e.kind), -e.used_at))


def clear(chosen: Iterable[Entry]) -> list[Entry]:
    """Remove entries; return those that are gone. What is in use stays."""
    return [entry for entry in chosen if not entry.in_use and remove(entry.kind, entry.path)]


def remove(kind: str, path: Path) -> bool:
    """Remove an entry of the cache; return False where a process has it in use."""
    held = _lock_alone(kind, path)
    if held is None:
        return False
    with held:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            gone = path.with_name(f".removed-{path.name}-{os.getpid()}")
            with suppress(FileNotFoundError):  # another process was faster
                path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    return True


def hold(path: Path) -> bool:
    """Mark a folder as used now, and in use until this process ends; return False where another
    process has just removed it.
    """
    try:
        with suppress(PermissionError):  # a cache that may only be read
            os.utime(path)
        there = path.stat()
        if (there.st_dev, there.st_ino) in _held:
            return True
        held = lock(path, alone=False, wait=True)
    except FileNotFoundError:
        return False
    except OSError:  # a system that does not open folders has no such locks
        return True
    assert held  # it waited
    _held[there.st_dev, there.st_ino] = held
    return held.is_of(path)


_held: dict[tuple[int, int], Lock] = {}  # by device and inode


def disk_bytes(path: Path) -> int:
    """Return the bytes that a file, or all in a folder, takes on the disk; links count nothing."""
    if path.is_dir() and not path.is_symlink():
        return sum(disk_bytes(each) for each in path.iterdir())
    return path.lstat().st_blocks * 512


def about(owner: str) -> dict[str, Any]:
    """Return what a kept file says of itself: for whom it was made, and when."""
    return {"for": owner, "made_at": time.time()}


def parse_age(text: str) -> float:
    """Return the seconds of an age such as 12h or 7d; UserError where it is none."""
    number, unit = text[:-1], text[-1:]
    try:
        age_s = float(number) * UNITS_S[unit]
    except (ValueError, KeyError):
        age_s = -1
    if not 0 <= age_s < float("inf"):
        raise UserError(f"{text!r} is no age; write one such as 90m, 12h, 7d or 2w")
    return age_s


def parse_kinds(text: str) -> tuple[str, ...]:
    """Return the kinds in "prefix,english" or "all" (what swlora made); UserError for others."""
    kinds = tuple(part.strip() for part in text.split(","))
    if kinds == ("all",):
        return MADE_HERE
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(
            f"no kind of cache is called {unknown[0]!r}; take all or some of {', '.join(KINDS)}"
        )
    return kinds


def select(found: Iterable[Entry], kinds: Collection[str], unused_s: float) -> list[Entry]:
    """Return the entries of these kinds that were not used for at least `unused_s`."""
    now_s = time.time()
    return [e for e in found if e.kind in kinds and now_s - e.used_at >= unused_s]


def left_by_run(folder: Path, since_s: float) -> tuple[int, int]:
    """Return the bytes of a run folder, and of what it made in the cache or has read there.

    A model that was there before is not what a run leaves; states that it read are.
    """
    used = [e for e in entries() if e.kind in KEPT and e.used_at >= since_s]
    left = (e for e in used if e.kind == PREFIX or e.made_at >= since_s)
    return disk_bytes(folder), sum(e.n_bytes for e in left)


def _places(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (kind, path) of everything in the cache folder."""
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.name.startswith("."):
            yield "scratch", path
        elif path.name in (PREFIX, ENGLISH) and path.is_dir():
            for each in sorted(path.iterdir()):
                yield "scratch" if each.name.startswith(".") else path.name, each
        else:
            yield "model" if (path / "config.json").is_file() else "other", path


def _entry(kind: str, path: Path) -> Entry:
    files = [each for each in path.iterdir() if each.is_file()] if path.is_dir() else [path]
    says = _about(path if kind == ENGLISH else path / ABOUT)
    used_at = path.lstat().st_mtime
    made_at = says.get("made_at") or min([used_at, *(f.lstat().st_mtime for f in files)])
    if kind == "scratch":
        in_use = time.time() - used_at < SCRATCH_S
    else:
        held = _lock_alone(kind, path)
        in_use = held is None
        if held is not None:
            held.release()
    owner = str(says.get("for") or path.name)
    return Entry(kind, path, disk_bytes(path), float(made_at), used_at, owner, in_use)


def _about(path: Path) -> dict[str, Any]:
    """Return what a kept file says of itself, {} where it says nothing that can be read."""
    try:
        if path.stat().st_size > MAX_ABOUT_BYTES:
            return {}
        said = json.loads(path.read_text(encoding="utf-8"))
        return {"for": said["for"], "made_at": float(said["made_at"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _lock_alone(kind: str, path: Path) -> Lock | None:
    """Lock an entry, so that nobody begins to use it; None where a process has it in use."""
    place = {"model": path, PREFIX: path / LOCK}.get(kind)
    if place is None or path.is_symlink():
        return Lock(None)
    try:
        return lock(place, alone=True)
    except OSError:  # never locked yet
        return Lock(None)
