"""Locks on files and folders: they end with the process that holds them, however it ends.

Where the system or a file system has no such locks, nothing counts as being in use.
"""

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from swlora.errors import UserError

LOOKS, LOOK_S = 3, 0.01  # at a folder that is locked: a look locks it for a moment, too


class Lock:
    """Something locked (nothing: None), until `release` or the end of a `with` block.

    `keeps_out` says whether others see it: not where the system has no locks.
    """

    def __init__(self, descriptor: int | None, *, keeps_out: bool = True) -> None:
        self._descriptor = descriptor
        self.keeps_out = keeps_out

    def release(self) -> None:
        """Let others have it; does nothing the second time."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a child process is handed so that it holds this, too, for as long as it lives."""
        return () if self._descriptor is None else (self._descriptor,)

    @property
    def is_held(self) -> bool:
        """Whether something is locked."""
        return self._descriptor is not None

    def is_of(self, path: Path) -> bool:
        """Say whether what was locked still lies at `path`, and nothing else took its place."""
        try:
            there = path.stat()
        except FileNotFoundError:
            return False
        return self._descriptor is None or os.path.samestat(os.fstat(self._descriptor), there)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def lock(path: Path, *, alone: bool, wait: bool = False, make: bool = False) -> Lock | None:
    """Lock a file or folder for this process `alone`, or together with others that share it.

    Waits for others, or returns None where one is in the way. `make` makes a missing file.
    Raises OSError where the path cannot be opened.
    """
    try:
        import fcntl
    except ImportError:
        return Lock(None, keeps_out=False)
    how = os.O_RDWR | os.O_CREAT if make else os.O_RDONLY
    descriptor = os.open(path, how | os.O_NONBLOCK, 0o644)  # a pipe in its place is not waited for
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        return Lock(descriptor, keeps_out=False)
    except BaseException:  # interrupted while waiting
        os.close(descriptor)
        raise
    return Lock(descriptor)


def is_locked(path: Path) -> bool:
    """Say whether a file or folder is known to be locked by a process alone."""
    return _is_held(path) is True


def is_abandoned(path: Path) -> bool:
    """Say whether it is known that no process has locked a file or folder alone."""
    return _is_held(path) is False


def _is_held(path: Path) -> bool | None:
    """Say whether a process has locked it alone; None where nothing is there, or has no locks."""
    try:
        held = lock(path, alone=False)
    except OSError:
        return None
    if held is None:
        return True
    held.release()
    return False if held.keeps_out else None


def lock_folder(folder: Path) -> Lock:
    """Lock a folder for the work of this process alone; UserError where another is at work."""
    tries = 0
    while True:
        held = lock(folder, alone=True)
        if held is None:
            tries += 1
            if tries == LOOKS:
                raise UserError(f"another process is at work in {folder}")
            time.sleep(LOOK_S)  # it may only look whether somebody is
            continue
        if held.is_of(folder):
            return held
        held.release()  # another folder took its place meanwhile
