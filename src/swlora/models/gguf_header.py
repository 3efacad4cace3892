"""What a .gguf file says of itself, read without its weights: which tensors it has, and where.

Every count and length is held against the length of the file before anything is made of it, so that
a file that is cut off, or lies about itself, costs one line and no memory.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

VERSIONS = (2, 3)
ALIGNMENT_BYTES = 32  # where the file names none
MAX_DIMENSIONS = 4  # as many as ggml has

# struct's letter for each type of a metadata value of fixed size; 8 is text and 9 a list
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_TEXT, _LIST = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in the file and how it is stored; `shape` is torch's (rows first)."""

    name: str
    shape: tuple[int, ...]
    kind: "GGMLQuantizationType"
    start: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The architecture as llama.cpp calls it, and the tensors by their names in the file.

    `facts` are the texts and numbers of its metadata by their keys; lists are None.
    """

    architecture: str
    tensors: Mapping[str, StoredTensor]
    facts: Mapping[str, Any]

    def own_facts(self, group: str) -> dict[str, Any]:
        """Return the texts and numbers of the architecture whose keys begin with `group`, by what
        follows it: "rope." gives "freq_base" and others.
        """
        prefix = f"{self.architecture}.{group}"
        found = {key: value for key, value in self.facts.items() if key.startswith(prefix)}
        return {key.removeprefix(prefix): v for key, v in found.items() if v is not None}


def read_gguf_table(path: Path) -> GgufHeader:
    """Read what a .gguf file says of itself, and hold it against the file.

    Raises UserError (one line) for a file that is no GGUF file, is cut off, is stored in a way that
    cannot be read, or whose counts cannot be.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (struct.error, ValueError, OverflowError, KeyError, OSError) as error:
        reason = f"what it says of itself is damaged ({error})" if str(error) else "it is damaged"
        raise UserError(f"{path} cannot be read as a GGUF language model: {reason}") from error


class _Reader:
    """Reads on from one place of the file to the next."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> GgufHeader:
        if self._take("<4s")[0] != b"GGUF":
            raise self._unfit("it does not begin as one")
        (version,) = self._take("<I")
        if version not in VERSIONS:
            is_swapped = version & 0xFFFF == 0
            why = "in the other order of bytes" if is_swapped else f"of version {version}"
            raise self._unfit(f"it is {why}; versions 2 and 3, little-endian, are read")
        n_tensors, n_values = self._take("<QQ")
        facts = {}
        for _ in range(n_values):
            key = self._text()
            facts[key] = self._value(*self._take("<I"))
        architecture, alignment = facts.get("general.architecture"), facts.get("general.alignment")
        if not isinstance(architecture, str):
            raise self._unfit("it names no architecture")
        alignment = ALIGNMENT_BYTES if alignment is None else alignment
        if not isinstance(alignment, int) or not 0 < alignment <= len(self._data):
            raise self._unfit(f"its alignment of {alignment} bytes cannot be")
        entries = [self._entry() for _ in range(n_tensors)]
        start = -(-self._at // alignment) * alignment
        tensors = {entry[0]: self._stored(start, *entry) for entry in entries}
        if len(tensors) < len(entries):
            raise self._unfit("two of its tensors have the same name")
        return GgufHeader(architecture, tensors, facts)

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _skip(self, n_bytes: int) -> None:
        self._at += n_bytes
        if self._at > len(self._data):
            raise self._unfit("it is cut off before its tensors begin")

    def _text(self) -> str:
        (n_bytes,) = self._take("<Q")
        start = self._at
        self._skip(n_bytes)
        return self._data[start : self._at].decode()

    def _value(self, kind: int) -> Any:
        """Return a text or number; None for a list, which is passed over."""
        if kind == _TEXT:
            return self._text()
        if kind in _SCALARS:
            return self._take(f"<{_SCALARS[kind]}")[0]
        if kind != _LIST:
            raise self._unfit(f"it holds a value of the unknown type {kind}")
        inner, n = self._take("<IQ")
        if inner in _SCALARS:
            self._skip(n * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _TEXT:
            for _ in range(n):
                self._skip(*self._take("<Q"))
        else:
            raise self._unfit(f"it holds a list of the unknown type {inner}")
        return None

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return the name, shape, type and place of a tensor, as they stand in the file."""
        name, (n_dimensions,) = self._text(), self._take("<I")
        if not 0 < n_dimensions <= MAX_DIMENSIONS:
            raise self._unfit(f"its tensor {name[:80]} has {n_dimensions} dimensions")
        shape = self._take(f"<{n_dimensions}Q")[::-1]
        return name, shape, *self._take("<IQ")

    def _stored(
        self, data_start: int, name: str, shape: tuple[int, ...], number: int, offset: int
    ) -> StoredTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        said = f"its tensor {name[:80]}"
        if number not in set(GGMLQuantizationType):
            raise self._unfit(f"{said} is quantised in an unknown way (type {number})")
        kind = GGMLQuantizationType(number)
        if not _can_dequantise(kind):
            raise self._unfit(f"{said} is stored as {kind.name}, which cannot be dequantised here")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        n_values = math.prod(shape)
        if n_values == 0 or shape[-1] % block:
            raise self._unfit(f"{said} has the shape {shape}, which {kind.name} cannot have")
        start, n_bytes = data_start + offset, n_values // block * block_bytes
        if start + n_bytes > len(self._data):
            raise self._unfit(
                f"it is cut off: {said} ends at byte {start + n_bytes:,}, and the file has "
                f"{len(self._data):,}"
            )
        return StoredTensor(name, shape, kind, start, n_bytes)

    def _unfit(self, reason: str) -> UserError:
        return UserError(f"{self._path} cannot be read as a GGUF language model: {reason}")


@cache
def _can_dequantise(kind: "GGMLQuantizationType") -> bool:
    """Say whether the gguf package turns this type into numbers, by letting it try one block."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True
