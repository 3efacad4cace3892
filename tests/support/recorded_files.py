"""What a kill or a power cut may leave of a folder, at every point between two file operations.

The operations of this process are heard through Python's audit events and `os.fsync`: a file opened
to write, a rename, a removal, a folder made. Before each of them, and after every fsync, the folder
is read in four ways:

    killed    as it is
    cut       the power went: names and bytes that no fsync made last are lost
    empty     the same, but the names had reached the disk, as they often have; bytes are lost
    torn      the same, and half of the bytes had reached it
"""

import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
WAYS = ("killed", "cut", "empty", "torn")
_RANDOM = re.compile(r"-\w{8}\.partial")

Files = dict[str, bytes | None]  # by their path in the folder; None for a folder


@dataclass(frozen=True)
class Left:
    """A folder as it may be left: in which way, and before or after which operation."""

    way: str
    point: str
    files: Files

    def write(self, folder: Path) -> None:
        """Make `folder` such a folder."""
        folder.mkdir(parents=True)
        for name, content in sorted(self.files.items()):
            if content is None:
                (folder / name).mkdir()
            else:
                (folder / name).write_bytes(content)


@dataclass
class _Disk:
    """What lies below a folder, and what of it would be there after a power cut.

    A file or folder has a number of its own for as long as it is there: the system may give that of
    a removed one to another.
    """

    root: Path
    names: dict[int, dict[str, int]] = field(default_factory=dict)  # of folders, on the disk
    bytes_: dict[int, bytes | None] = field(default_factory=dict)  # on the disk; None: a folder
    _number_of: dict[int, int] = field(default_factory=dict)  # by the system's number
    _free: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.look()
        self.synced(self.root)

    def look(self) -> Files:
        """Return what is there now, and number what is new."""
        found: Files = {}
        seen = {self.root.stat().st_ino}
        for path in sorted(self.root.rglob("*")):
            facts = path.lstat()
            seen.add(facts.st_ino)
            name = path.relative_to(self.root).as_posix()
            found[name] = None if stat.S_ISDIR(facts.st_mode) else path.read_bytes()
        for gone in self._number_of.keys() - seen:
            del self._number_of[gone]
        for new in seen - self._number_of.keys():
            self._number_of[new] = next(self._free)
        return found

    def number(self, path: Path) -> int:
        return self._number_of[path.lstat().st_ino]

    def synced(self, path: Path) -> None:
        """Note that a file's bytes, or a folder's names, have reached the disk."""
        number = self.number(path)
        if path.is_dir():
            self.names[number] = {child.name: self.number(child) for child in path.iterdir()}
            for child in path.iterdir():
                if child.is_dir():
                    self.bytes_[self.number(child)] = None
        else:
            self.bytes_[number] = path.read_bytes()

    def after_a_cut(self) -> Files:
        """Return what would be there if nothing but what was synced had reached the disk."""
        left: Files = {}

        def add(folder: int, start: str) -> None:
            for name, number in self.names.get(folder, {}).items():
                is_folder = number in self.bytes_ and self.bytes_[number] is None
                left[start + name] = None if is_folder else self.bytes_.get(number, b"")
                if is_folder:
                    add(number, f"{start}{name}/")

        add(self.number(self.root), "")
        return left

    def with_names_kept(self, now: Files, share: float) -> Files:
        """Return what is there now, with a share of the bytes of files that were not synced."""
        left: Files = {}
        for name, content in now.items():
            synced = None if content is None else self.bytes_.get(self.number(self.root / name))
            if content is None or synced == content:
                left[name] = content
            else:
                n_synced = len(synced or b"") if content.startswith(synced or b"") else 0
                left[name] = content[: n_synced + int(share * (len(content) - n_synced))]
        return left


class _Recorder:
    """Hears the operations of this process, and reads the folder at each."""

    def __init__(self, root: Path) -> None:
        self.disk = _Disk(root)
        self.left: list[Left] = []
        self.n_points = 0
        self._is_reading = False

    def at(self, point: str) -> None:
        """Read the folder in all ways."""
        if self._is_reading:
            return
        self._is_reading = True
        try:
            now = self.disk.look()
            ways = (
                now,
                self.disk.after_a_cut(),
                self.disk.with_names_kept(now, 0.0),
                self.disk.with_names_kept(now, 0.5),
            )
            self.left += [Left(way, point, files) for way, files in zip(WAYS, ways, strict=True)]
            self.n_points += 1
        finally:
            self._is_reading = False

    def hears(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take in an audit event, which comes before what it tells of."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | os.PathLike) and flags & WRITES and self._is_below(path):
                self.at(f"open {self._shown(path)}")
        elif event in CHANGES:
            path, folder = arguments[0], arguments[-1]
            if isinstance(folder, int) and folder >= 0 and event in ("os.remove", "os.rmdir"):
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
            if self._is_below(path):
                self.at(f"{event} {self._shown(path)}")

    def syncs(self, descriptor: int, fsync: Callable[[int], None]) -> None:
        """Sync, and read the folder before and after it."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not (path == self.disk.root or self._is_below(path)):
            fsync(descriptor)
            return
        self.at(f"fsync {self._shown(path)}")
        fsync(descriptor)
        self.disk.synced(path)
        self.at(f"after fsync {self._shown(path)}")

    def _is_below(self, path: Any) -> bool:
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.disk.root)

    def _shown(self, path: Any) -> str:
        return plain_name(os.path.relpath(os.fsdecode(path), self.disk.root))


_recorder: _Recorder | None = None
_hooked: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _recorder is not None and not _recorder._is_reading:
        _recorder.hears(event, arguments)


@contextmanager
def recorded(root: Path) -> Iterator[_Recorder]:
    """Record what the body does below the folder `root`, which lasts."""
    global _recorder
    if not _hooked:
        sys.addaudithook(_audit)  # there is no way to take one away
        _hooked.append(True)
    recorder, fsync = _Recorder(root.resolve()), os.fsync

    def heard(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        recorder.syncs(descriptor, fsync)

    _recorder, os.fsync = recorder, heard
    try:
        yield recorder
        recorder.at("end")
    finally:
        _recorder, os.fsync = None, fsync


def plain_name(name: str) -> str:
    """Return a path without what is random in the names of scratch files."""
    return _RANDOM.sub("-X.partial", name)
