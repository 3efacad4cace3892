"""What a chat's template had written when it first asked for each turn: one rendering for many.

A template that writes turn by turn has seen nothing of what comes later when it asks for a turn, so
its text until then is also that of the chat that ends there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from swlora.data.chat_bounds import limited_rendering


@dataclass(frozen=True, slots=True)
class Traced:
    """A text; how much of it was written when turn i was asked for; its own marks."""

    text: str
    begins: list[int]
    marks: list[tuple[int, int]]


class _Turns(Sequence[Any]):
    """Turns that note how much was written when each was first asked for.

    No list, so that a template has no way to see one unnoticed. Whatever needs to know how many
    there are asks for all of them.
    """

    def __init__(
        self, turns: Sequence[Any], begins: list[int | None], written: list[int], first: int = 0
    ) -> None:
        self._turns, self._begins, self._written, self._first = turns, begins, written, first

    def _note(self, upto: int) -> None:
        begins, at = self._begins, upto + self._first
        while at >= 0 and begins[at] is None:  # who is asked for later stands behind
            begins[at] = self._written[0]
            at -= 1

    def __iter__(self) -> Iterator[Any]:
        for i, turn in enumerate(self._turns):
            self._note(i)
            yield turn
        self._note(len(self._turns))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start = key.start or 0
            if key.step in (None, 1) and key.stop is None and 0 <= start <= len(self._turns):
                self._note(start - 1)
                return _Turns(self._turns[start:], self._begins, self._written, self._first + start)
        elif 0 <= key < len(self._turns):
            self._note(key)
            return self._turns[key]
        self._note(len(self._turns))
        return self._turns[key]

    def __len__(self) -> int:
        self._note(len(self._turns))
        return len(self._turns)

    def __repr__(self) -> str:
        raise TypeError("a template that writes its turns as they are shows a list of them")

    def __bool__(self) -> bool:
        self._note(0)
        return bool(self._turns)


def trace(compiled: Any, messages: Sequence[Any], variables: dict[str, Any]) -> Traced | None:
    """Render messages once; None where the template fails, or does not ask for all of them."""
    begins: list[int | None] = [None] * (len(messages) + 1)
    written, pieces = [0], list[str]()
    marks: list[tuple[int, int]] = []
    watched = _Turns(messages, begins, written)
    try:
        with limited_rendering(), compiled.environment.activate_tracker(pieces, marks):
            for piece in compiled.generate(messages=watched, **variables):
                pieces.append(piece)
                written[0] += len(piece)
    except Exception:  # a template may fail in any way; the whole rendering says in which
        return None
    if None in begins:
        return None
    text = "".join(pieces)
    return Traced(text, [*(b for b in begins[:-1] if b is not None), len(text)], marks)
