"""What was read from files under --runs, kept while they stay as they were."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swlora.errors import UserError

MAX_BYTES = 32 << 20  # of files of which something is kept; parsed, they are some times that
_Stamp = tuple[int, int, int]


class KnownFiles:
    """Values read from files, by path; read again where time, size or inode is another.

    Files that are written here are replaced, never changed in place. Of all that are known, those
    asked for last are kept, as many as were `max_bytes` on the disk.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._n_bytes = max_bytes, 0
        self._lock = threading.Lock()
        self._known: OrderedDict[Path, tuple[_Stamp, Any, str]] = OrderedDict()

    def read(self, path: Path, read: Callable[[], Any]) -> Any:
        """Return what `read` returns of the file, which nobody may change; UserError likewise."""
        stamp = _stamp(path)
        if stamp is None:
            return read()  # which says why
        with self._lock:
            if (known := self._known.get(path)) and known[0] == stamp:
                self._known.move_to_end(path)
                return _value(known)
        try:
            found = (stamp, read(), "")
        except UserError as error:
            if _is_of_the_system(error):  # no more files may be open, say: not the file's content
                raise
            found = (stamp, None, str(error))
        self._keep(path, found)
        return _value(found)

    def _keep(self, path: Path, found: tuple[_Stamp, Any, str]) -> None:
        with self._lock:
            self._forget(path)
            self._known[path] = found
            self._n_bytes += found[0][1]
            while self._n_bytes > self._max_bytes:
                self._forget(next(iter(self._known)))

    def _forget(self, path: Path) -> None:
        if known := self._known.pop(path, None):
            self._n_bytes -= known[0][1]


def _value(known: tuple[_Stamp, Any, str]) -> Any:
    if known[2]:
        raise UserError(known[2])
    return known[1]


def _is_of_the_system(error: BaseException | None) -> bool:
    """Say whether an OSError is behind an error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
