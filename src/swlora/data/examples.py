"""An example, which is what a row of data becomes, and where many of them are kept.

Examples stay in memory up to about `scratch.MEMORY_BYTES`. Beyond that they lie in a file, and only
where each begins is in memory; they are read back where they are asked for.
"""

import gc
import json
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from swlora.data import scratch

ASSISTANT = "assistant"
PromptKey = str | tuple[str, ...]  # a tuple is that of a chat
# Of what is tokenised at once: half a million tokens, more than most models read. Tokenising takes
# 170 to 700 times as much memory.
MAX_TEXT_BYTES = 2 << 20
_MAX_BYTES_PER_CHARACTER = 4  # in UTF-8
_OBJECT_BYTES = 100  # of a string or a tuple, beyond its characters, as Python keeps it
_WRITE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a chat.

    `trained` is how much its text is trained, None for as `--train-on` says. `extra` is a JSON
    object of what the template is given besides (tool_calls, name, a content in parts), "" for
    nothing.
    """

    role: str
    content: str
    trained: float | None = None
    extra: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its completion, a chat, or a text of which every token is trained.

    A chat has `messages`, all of its turns, and `tools`, a JSON list or ""; its completion is the
    assistant's last answer but for those of weight 0, which are there not to be learnt from (of a
    call of tools without words, its JSON), and "" where the last turn is another's. A text has
    `text` alone.
    `source` and `number` say where it came from ("rows.jsonl, line", 7); they are no part of it.
    """

    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    tools: str = ""
    text: str = ""
    source: str = field(default="", compare=False)
    number: int = field(default=0, compare=False)

    @classmethod
    def chat(cls, messages: Iterable[Message], tools: str = "") -> Self:
        """Return a chat of these turns; one that an answer is to be generated for ends in a user's.

        Raises ValueError for no turns.
        """
        turns = tuple(messages)
        if not turns:
            raise ValueError("a chat has one turn or more")
        if (n := _n_before_answer(turns)) == len(turns):
            return cls("", "", turns, tools)
        answer = turns[n]
        return cls("", answer.content if answer.content.strip() else answer.extra, turns, tools)

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The turns of a chat before its completion."""
        return self.messages[: _n_before_answer(self.messages)]

    @property
    def prompt_key(self) -> PromptKey:
        """What two examples have in common exactly where their prompts are the same.

        That of a text is the text. The prompt of a pair holds no NUL, with which a text's begins.
        """
        if self.messages:
            turns = ((m.role, m.content, m.extra) for m in self.prompt_messages)
            return (self.tools, *chain.from_iterable(turns))
        return f"\0text{self.text}" if self.text else self.prompt

    @property
    def place(self) -> str:
        """Where the example came from, for messages; "" where that is not known."""
        return f"{self.source} {self.number}" if self.source else ""

    def place_or_row(self, index: int) -> str:
        """Return where the example came from; where that is not known, its number in the split."""
        return self.place or f"row {index + 1}"

    @property
    def fields(self) -> list[Any]:
        """What the example holds, without where it came from, as values of JSON."""
        turns = [[m.role, m.content, m.trained, m.extra] for m in self.messages]
        rest = [self.tools, self.text] if self.tools or self.text else []
        return [turns, self.prompt, self.completion, *rest]

    @property
    def n_bytes(self) -> int:
        """About what the example takes in memory."""
        texts = [self.prompt, self.tools, self.text, *(m.extra for m in self.messages)]
        texts += [m.content for m in self.messages] or [self.completion]
        return sum(map(len, texts)) + _OBJECT_BYTES * (len(texts) + 1 + len(self.messages))


def _n_before_answer(turns: Sequence[Message]) -> int:
    """Count the turns before the answer that is a chat's completion; all where it has none."""
    if not turns or turns[-1].role != ASSISTANT:
        return len(turns)
    answers = (n for n in reversed(range(len(turns))) if turns[n].role == ASSISTANT)
    return next((n for n in answers if turns[n].trained != 0), len(turns) - 1)


def length_problem(example: Example) -> str | None:
    """Say that an example is too long to be tokenised; None where it is not, and for a document."""
    if example.text or example.n_bytes * _MAX_BYTES_PER_CHARACTER <= MAX_TEXT_BYTES:
        return None
    parts = [example.prompt, example.completion, example.tools]
    if example.messages:
        parts = [example.tools, *(m.content + m.extra for m in example.messages)]
    return too_long_text(sum(len(part.encode()) for part in parts))


def too_long_text(n_bytes: int, where: str = "") -> str | None:
    """Say that so much text is too long to be tokenised at once; None where it is not."""
    if n_bytes <= MAX_TEXT_BYTES:
        return None
    return f"it is too long ({n_bytes:,} bytes of text{where}, and {MAX_TEXT_BYTES:,} is the most)"


def make_example(prompt: object, completion: object) -> Example | str:
    """Return the row as an Example, or the reason why it cannot be one."""
    for what, text in (("prompt", prompt), ("completion", completion)):
        if problem := text_problem(text):
            return f"its {what} {problem}"
    return Example(str(prompt), str(completion))


def make_text(text: object) -> Example | str:
    """Return a document as an Example, or the reason why it cannot be one."""
    problem = text_problem(text)
    return f"its text {problem}" if problem else Example(text=str(text))


def text_problem(text: object) -> str | None:
    """Say why something cannot be a text to train on; None where it can."""
    if not isinstance(text, str):
        return f"is not a string ({_kind(text)})"
    return check_text(text) if text.strip() else "is empty"


def _kind(value: object) -> str:
    """Return what a value of a record is, in words of JSON where it is of JSON."""
    kinds = {type(None): "null", list: "a list", dict: "an object"}
    kinds |= dict.fromkeys((bool, int, float), "a number")
    return kinds.get(type(value), type(value).__name__)


def check_text(text: str) -> str | None:
    """Say what makes a text unfit for any tokenizer; None for nothing."""
    if "\0" in text:
        return "holds a NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    return None


def keep(examples: Iterable[Example]) -> Sequence[Example]:
    """Read all examples and keep them: a tuple, or StoredExamples where the text is long.

    Raises RunFailedError where they do not fit on the disk either.
    """
    iterator, in_memory, n_bytes = iter(examples), deque[Example](), 0
    with _no_collection():
        for example in iterator:
            in_memory.append(example)
            n_bytes += example.n_bytes
            if n_bytes > scratch.MEMORY_BYTES:
                break
        else:
            return tuple(in_memory)
    freed_on_the_way = (in_memory.popleft() for _ in range(len(in_memory)))
    return StoredExamples.write(chain(freed_on_the_way, iterator))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause Python's search for cycles: examples hold none, and each search would visit them all.

    It took a quarter of the time of reading.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def select(examples: Sequence[Example], ids: NDArray[np.int64]) -> Sequence[Example]:
    """Return the examples `ids`, in that order, kept where the others are."""
    if isinstance(examples, StoredExamples):
        return examples.select(ids)
    return tuple(examples[i] for i in ids.tolist())


class StoredExamples(Sequence[Example]):
    """Examples in a file, read one by one; slices and selections of them share the file."""

    def __init__(
        self,
        file: scratch.ScratchFile,
        offsets: NDArray[np.int64],
        ids: NDArray[np.int64],
        sources: Sequence[str],
    ) -> None:
        """Take ids (n,) of the examples that begin at offsets (n_stored + 1,) of the file.

        Each names its source by its place in `sources`.
        """
        self._file, self._offsets, self._ids, self._sources = file, offsets, ids, sources

    @classmethod
    def write(cls, examples: Iterable[Example]) -> Self:
        """Write examples to a file of their own."""
        file, offsets, waiting = scratch.ScratchFile("the rows"), array("q", [0]), bytearray()
        sources: dict[str, int] = {}
        for example in examples:
            source = sources.setdefault(example.source, len(sources))
            fields = [source, example.number, *example.fields]
            waiting += json.dumps(fields, ensure_ascii=False).encode()
            offsets.append(file.n_bytes + len(waiting))
            if len(waiting) > _WRITE_BYTES:
                file.append(bytes(waiting))
                waiting.clear()
        file.append(bytes(waiting))
        return cls(file, np.array(offsets), np.arange(len(offsets) - 1), tuple(sources))

    def select(self, ids: NDArray[np.int64] | slice) -> "StoredExamples":
        """Return the examples `ids` of these, in that order."""
        return StoredExamples(self._file, self._offsets, self._ids[ids], self._sources)

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
        source, number, turns, prompt, completion, *rest = json.loads(
            self._file.read(int(self._offsets[i]), int(self._offsets[i + 1]))
        )
        messages = tuple(Message(*turn) for turn in turns)
        tools, text = rest or ("", "")
        return Example(prompt, completion, messages, tools, text, self._sources[source], number)
