"""Tokens of a text and where in it they begin; those of one that begins like a longer text."""

from collections.abc import Collection
from typing import Any, Self


class TextTokens:
    """A text and its tokens; `ids` are their numbers."""

    def __init__(self, text: str, encoding: Any, longer: Self | None = None, cut: int = 0) -> None:
        """Take what a tokenizer says of text[cut:]; what comes before is as in `longer`."""
        self.text = text
        self._encoding, self._longer, self._cut = encoding, longer, cut
        self._n_before = (longer.place(cut) or 0) if longer else 0
        self.ids: list[int] = encoding.ids
        if longer and self._n_before:
            self.ids = [*longer.ids[: self._n_before], *self.ids]

    def place(self, at: int) -> int | None:
        """Return the number of tokens of text[:at], None where `at` lies within a token."""
        if at == len(self.text):
            return len(self.ids)
        if self._longer and at < self._cut:
            return self._longer.place(at)
        found = self._encoding.char_to_token(at - self._cut)
        if found is None or self._encoding.token_to_chars(found)[0] != at - self._cut:
            return None
        return int(found) + self._n_before

    def begin(self, i: int) -> int:
        """Return where in the text token i begins."""
        if self._longer and i < self._n_before:
            return self._longer.begin(i)
        return int(self._encoding.token_to_chars(i - self._n_before)[0]) + self._cut

    def cut(self, other: str, splitting: Collection[int], longest: int) -> int:
        """Return where another text can be cut so that its first part has the tokens of this one.

        That is before the last token of `splitting`, of `longest` characters at most, that both
        have; 0 where there is none. This is the text of one encoding.
        """
        n_common = _n_common(self.text, other)
        i = (self._encoding.char_to_token(n_common - 1) or 0) if n_common else 0
        while i > 0 and not (self.ids[i] in splitting and self.begin(i) + longest <= n_common):
            i -= 1
        return self.begin(i) if i > 0 else 0


def _n_common(a: str, b: str) -> int:
    """Return how many characters two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
