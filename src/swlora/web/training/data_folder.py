"""The data that may be trained on from the page: what lies in one folder, named at start.

A request names what was listed here and never a path. A name is the path below the folder, with
"/" between its parts; that of a folder of E2E data ends in one.
"""

import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from swlora.data.e2e import E2E_FILES
from swlora.data.records import ending
from swlora.web.walk import is_plain, walk

MAX_DEPTH = 4
MAX_FOLDERS = 1_000
MAX_FILES = 200  # listed
FRESH_S = 2.0


@dataclass(frozen=True)
class DataFile:
    """A file of rows, or a folder of E2E data; `version` changes with it."""

    name: str
    path: Path = field(repr=False)
    n_bytes: int
    changed_s: float

    @property
    def is_e2e(self) -> bool:
        """Whether it is a folder of E2E data, which has its own splits and columns."""
        return self.name.endswith("/")

    @property
    def version(self) -> tuple[int, float]:
        """What is another one when the file is."""
        return self.n_bytes, self.changed_s


class DataFolder:
    """The data below `root`; walked again when what is known is older than 2 s.

    Links are not followed, hidden names are left out, and so is the folder `aside`, of the runs.
    """

    def __init__(self, root: Path, aside: Path) -> None:
        self.root = root.resolve()
        self._aside = aside.resolve()
        self._lock = threading.Lock()
        self._walked_s = float("-inf")
        self._files: dict[str, DataFile] = {}
        self._is_whole = True

    def files(self) -> dict[str, DataFile]:
        """Return the data by name, `MAX_FILES` at most."""
        with self._lock:
            if time.monotonic() - self._walked_s >= FRESH_S:
                found = []
                for file in self._walk():
                    found.append(file)
                    if len(found) > MAX_FILES:
                        break
                self._is_whole = len(found) <= MAX_FILES
                self._files = {file.name: file for file in found[:MAX_FILES]}
                self._walked_s = time.monotonic()
            return self._files

    @property
    def is_whole(self) -> bool:
        """Whether all of them were listed."""
        return self._is_whole

    def holds(self, path: Path) -> bool:
        """Say whether a path lies in the folder."""
        return path.resolve().is_relative_to(self.root)

    def _walk(self) -> Iterator[DataFile]:
        walked = walk(self.root, max_depth=MAX_DEPTH, max_folders=MAX_FOLDERS, aside=self._aside)
        for folder_name, folder, names in walked:
            files = {name: found for name in sorted(names) if (found := _regular(folder / name))}
            if set(E2E_FILES) <= files.keys():
                own = [files.pop(name) for name in E2E_FILES]
                n_bytes = sum(one.st_size for one in own)
                yield DataFile(f"{folder_name}/", folder, n_bytes, max(one.st_mtime for one in own))
            for name, found in files.items():
                if is_plain(name) and ending(Path(name)):
                    path = folder / name
                    whole = path.relative_to(self.root).as_posix()
                    yield DataFile(whole, path, found.st_size, found.st_mtime)


def _regular(path: Path) -> os.stat_result | None:
    """Return what is known of a regular file that is no link; None for anything else."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None
