"""What is read of a .gguf file together makes gguf's reader of it once, a quick one.

transformers 5.23 makes a reader of gguf's (0.19) for the configuration, the tokenizer and the
weights each, and for the weights the table of all names of tensors anew for each module of the
model: most of the time that loading takes (findings/gguf_loading_repeats_itself.sh).
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import gguf
import numpy as np
from numpy.typing import NDArray

_names = threading.RLock()  # held while gguf's own are changed


@contextmanager
def read_once() -> Iterator[None]:
    """Let transformers make one reader of a path, and one table of names, while this lasts.

    Reads that are nested share them; other threads wait.
    """
    with _names:
        before = {name: vars(gguf)[name] for name in ("GGUFReader", "get_tensor_name_map")}
        if before["GGUFReader"] is not gguf.gguf_reader.GGUFReader:
            yield  # inside another, which puts things back
            return
        try:
            vars(gguf).update(
                GGUFReader=functools.cache(_OfPlainArrays),
                get_tensor_name_map=functools.cache(before["get_tensor_name_map"]),
            )
            yield
        finally:
            vars(gguf).update(before)


class _OfPlainArrays(gguf.GGUFReader):  # type: ignore[misc]  # gguf has no types
    """A reader whose entries are plain arrays: slices of a memmap take longer to make."""

    _bytes: NDArray[np.uint8]

    @property
    def data(self) -> NDArray[np.uint8]:
        """The mapped file."""
        return self._bytes

    @data.setter
    def data(self, mapped: "np.memmap[tuple[int], np.dtype[np.uint8]]") -> None:
        self._bytes = mapped.view(np.ndarray)
