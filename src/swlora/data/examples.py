"""An example, which is what a row of data becomes, and where many of them are kept.

Examples stay in memory up to about `scratch.MEMORY_BYTES`. Beyond that they lie in a file, and only
where each begins is in memory; they are read back where they are asked for.
"""

import json
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

from swlora.data import scratch

_OBJECT_BYTES = 100  # of a string or a tuple, beyond its characters, as Python keeps it
_WRITE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its completion, or the turns of a chat and its last answer.

    `messages` holds the (role, content) turns before the completion; `prompt` is "" then.
    """

    prompt: str
    completion: str
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def n_bytes(self) -> int:
        """About what the example takes in memory."""
        texts = [self.prompt, self.completion, *(content for _, content in self.messages)]
        return sum(map(len, texts)) + _OBJECT_BYTES * (len(texts) + 1 + len(self.messages))


def make_example(prompt: object, completion: object) -> Example | str:
    """Return the row as an Example, or the reason why it cannot be one."""
    for what, text in (("prompt", prompt), ("completion", completion)):
        if not isinstance(text, str):
            return f"its {what} is not a string"
        if not text.strip():
            return f"its {what} is empty"
        if "\0" in text:
            return f"its {what} holds a NUL byte"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return f"its {what} is not valid UTF-8"
    return Example(str(prompt), str(completion))


def keep(examples: Iterable[Example]) -> Sequence[Example]:
    """Read all examples and keep them: a tuple, or StoredExamples where the text is long.

    Raises RunFailedError where they do not fit on the disk either.
    """
    iterator, in_memory, n_bytes = iter(examples), deque[Example](), 0
    for example in iterator:
        in_memory.append(example)
        n_bytes += example.n_bytes
        if n_bytes > scratch.MEMORY_BYTES:
            freed_on_the_way = (in_memory.popleft() for _ in range(len(in_memory)))
            return StoredExamples.write(chain(freed_on_the_way, iterator))
    return tuple(in_memory)


def select(examples: Sequence[Example], ids: NDArray[np.int64]) -> Sequence[Example]:
    """Return the examples `ids`, in that order, kept where the others are."""
    if isinstance(examples, StoredExamples):
        return examples.select(ids)
    return tuple(examples[i] for i in ids.tolist())


class StoredExamples(Sequence[Example]):
    """Examples in a file, read one by one; slices and selections of them share the file."""

    def __init__(
        self, file: scratch.ScratchFile, offsets: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> None:
        """Take ids (n,) of the examples that begin at offsets (n_stored + 1,) of the file."""
        self._file, self._offsets, self._ids = file, offsets, ids

    @classmethod
    def write(cls, examples: Iterable[Example]) -> Self:
        """Write examples to a file of their own."""
        file, offsets, waiting = scratch.ScratchFile("the rows"), array("q", [0]), bytearray()
        for example in examples:
            fields = [example.prompt, example.completion, example.messages]
            waiting += json.dumps(fields, ensure_ascii=False).encode()
            offsets.append(file.n_bytes + len(waiting))
            if len(waiting) > _WRITE_BYTES:
                file.append(bytes(waiting))
                waiting.clear()
        file.append(bytes(waiting))
        return cls(file, np.array(offsets), np.arange(len(offsets) - 1))

    def select(self, ids: NDArray[np.int64] | slice) -> "StoredExamples":
        """Return the examples `ids` of these, in that order."""
        return StoredExamples(self._file, self._offsets, self._ids[ids])

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, key: int) -> Example: ...
    @overload
    def __getitem__(self, key: slice) -> "StoredExamples": ...
    def __getitem__(self, key: int | slice) -> "Example | StoredExamples":
        if isinstance(key, slice):
            return self.select(key)
        i = int(self._ids[key])
        prompt, completion, messages = json.loads(
            self._file.read(int(self._offsets[i]), int(self._offsets[i + 1]))
        )
        return Example(prompt, completion, tuple((role, content) for role, content in messages))
