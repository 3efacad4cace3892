"""Tokens to text while they come: no half characters, nothing of a stop text, nothing twice.

A character may be spread over several tokens, so text is given out when the tokens so far decode
to something that does not end in a replacement character. Text that could be the beginning of a
stop text is held back until it is clear that it is not one.
"""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 6
MAX_HELD_TOKENS = 64  # longer than any character: these bytes are no text


class Detokeniser:
    """Text of one sequence, piece by piece.

    The last tokens of the prompt are decoded along, since some tokenizers write a word's space
    only where something stands before it.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int] = (), *, skips_special: bool = True
    ) -> None:
        self._tokenizer, self._skips_special = tokenizer, skips_special
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        if self._decode(self._ids).endswith(REPLACEMENT):
            self._ids = []
        self._n_context = len(self._ids)  # the first of _ids: given out, and decoded along

    def add(self, token_id: int) -> str:
        """Take a token; return the text that is certain now."""
        self._ids.append(token_id)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._ids) - self._n_context < MAX_HELD_TOKENS:
            return ""
        return self._give(text)

    def finish(self) -> str:
        """Return what was held back."""
        return self._give(self._new_text())

    def _new_text(self) -> str:
        context = self._decode(self._ids[: self._n_context])
        return self._decode(self._ids)[len(context) :]

    def _give(self, text: str) -> str:
        if text:  # a special token is no context for what follows it
            self._ids = self._ids[self._n_context :]
            self._n_context = len(self._ids)
        elif len(self._ids) - self._n_context >= MAX_HELD_TOKENS:
            self._ids = self._ids[: self._n_context]
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=self._skips_special, clean_up_tokenization_spaces=False
            )
        )


def prompt_offsets(tokenizer: Any, prompt_ids: Sequence[int], text: str) -> list[int]:
    """Return where in `text` each token of a prompt begins; special tokens before it, at 0."""
    detokeniser, ends = Detokeniser(tokenizer, skips_special=False), [0]
    for token_id in prompt_ids:
        ends.append(ends[-1] + len(detokeniser.add(token_id)))
    n_before = max(0, ends[-1] + len(detokeniser.finish()) - len(text))
    return [max(0, start - n_before) for start in ends[:-1]]


class StopFilter:
    """Text up to the first stop text; `stopped` says that one was met."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Take text; return what is certain to stand before any stop text."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._n_doubtful())

    def finish(self) -> str:
        """Return what was held back, now that nothing follows."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text

    def _n_doubtful(self) -> int:
        """Return the length of the longest end of the text with which a stop text begins."""
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stops), default=0))
        for n in range(longest, 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0
