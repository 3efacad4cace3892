"""Data larger than memory: appended to a file without a name, which ends with the process.

Such a file lies in the cache folder, since a system's folder for temporary files may be memory.
Small data never see it.
"""

import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swlora.errors import RunFailedError
from swlora.paths import cache_dir

MEMORY_BYTES = 1 << 28  # of the rows of a file, or of the tokens: more goes to a scratch file
_TOKEN_BYTES = 5  # with its weight
_COPIED_AT_ONCE = 1 << 20


class ScratchFile:
    """Bytes that are appended and read again; RunFailedError where they cannot be kept."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.n_bytes = 0
        try:
            cache_dir().mkdir(parents=True, exist_ok=True)
            # It lasts as long as this object.
            self._file = tempfile.TemporaryFile(dir=cache_dir(), buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failure(error) from error

    def append(self, data: bytes | memoryview) -> None:
        """Write `data` behind what is there."""
        view = memoryview(data).cast("B")
        self.n_bytes += len(view)
        try:
            while len(view):
                view = view[os.write(self._file.fileno(), view) :]
        except OSError as error:
            raise self._failure(error) from error

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to before `stop`; safe in several threads at once."""
        try:
            data = os.pread(self._file.fileno(), stop - start, start)
            if len(data) != stop - start:
                raise OSError("the file is shorter than it was")
        except OSError as error:
            raise self._failure(error) from error
        return data

    def mapped(self, dtype: type[np.generic]) -> NDArray[Any]:
        """Return all as a read-only one-dimensional array, paged in where it is read."""
        try:
            os.fsync(self._file.fileno())  # a disk that is full is an error here, a crash later
        except OSError as error:
            raise self._failure(error) from error
        return np.memmap(self._file, dtype=dtype, mode="r")

    def _failure(self, error: OSError) -> RunFailedError:
        return RunFailedError(
            f"cannot keep {self._what} in {cache_dir()}: {error.strerror or error}; "
            "SWLORA_CACHE names another folder"
        )


class GrowingArray:
    """A one-dimensional array made of parts, in memory or, when it is long, in a mapped file.

    It is long when as many tokens with their weights take more than MEMORY_BYTES, whatever the
    size of its own elements: what belongs to the tokens goes where they go.
    """

    def __init__(self, dtype: type[np.generic], what: str) -> None:
        self._dtype = dtype
        self._what = what
        self._parts: list[NDArray[Any]] = []
        self._file: ScratchFile | None = None

    def append(self, part: NDArray[Any]) -> None:
        """Add the elements of `part` behind the others."""
        part = np.ascontiguousarray(part, dtype=self._dtype)
        self._parts.append(part)
        if self._file is None and _TOKEN_BYTES * sum(map(len, self._parts)) > MEMORY_BYTES:
            self._file = ScratchFile(self._what)
        if self._file is not None:
            for one in self._parts:
                self._file.append(one.data)
            self._parts.clear()

    def widened(self, dtype: type[np.generic]) -> "GrowingArray":
        """Return an array of the same elements as another type; itself where it has that type."""
        if dtype == self._dtype:
            return self
        wide, elements = GrowingArray(dtype, self._what), self.finished()
        for start in range(0, len(elements), _COPIED_AT_ONCE):
            wide.append(elements[start : start + _COPIED_AT_ONCE])
        return wide

    def finished(self) -> NDArray[Any]:
        """Return the array; nothing can be added then."""
        if self._file is not None:
            return self._file.mapped(self._dtype)
        parts, self._parts = self._parts, []  # in memory twice no longer than for this
        return np.concatenate([np.empty(0, self._dtype), *parts])
