"""Texts to tokens piece by piece: a piece that several texts have is tokenised once.

A tokenizer takes its added tokens out of a text before it looks at the rest, so a text may be cut
in front of one: its tokens are those of the pieces, one behind the other.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from swlora.data.tokenise import piece_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextTokens:
    """A text and its tokens; `ids` are their numbers."""

    def __init__(self, pieces: Sequence[str], ids: Sequence[list[int]]) -> None:
        """Take the pieces of a text and the tokens of each."""
        self._pieces, self._of_pieces = pieces, ids
        self._starts = [0, *accumulate(map(len, pieces))]  # in characters
        self._n_before = [0, *accumulate(map(len, ids))]
        self.ids = list(chain.from_iterable(ids))

    def place(self, at: int, ids_of: Callable[[str], list[int]]) -> int | None:
        """Return the number of tokens of text[:at], None where they do not begin those of text.

        `ids_of` tokenises a text by itself.
        """
        i = bisect_right(self._starts, at) - 1
        if at == self._starts[i]:
            return self._n_before[i]
        ids = ids_of(self._pieces[i][: at - self._starts[i]])
        return self._n_before[i] + len(ids) if self._of_pieces[i][: len(ids)] == ids else None


class PieceTokenizer:
    """Tokenises texts as a fast tokenizer does, without special tokens around them.

    They are cut in front of added tokens, but not in front of the tokens `uncut`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", uncut: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}  # what the last texts had in common
        added = tokenizer.added_tokens_decoder.items()
        if getattr(tokenizer, "split_special_tokens", False):
            added = {}.items()  # it reads them as text
        # Those that are looked for before the text is normalised; of several the longest is found
        first = {t.content: i for i, t in added if t.content and not t.normalized}
        self._find = re.compile("|".join(map(re.escape, sorted(first, key=len, reverse=True))))
        # Some take spaces before them along, or are none beside a letter
        fits = re.compile(r"[^\s\w]").match
        unfit = {i for i, t in added if t.lstrip or t.single_word or not fits(t.content)}
        self._cut_at = {text for text, i in first.items() if i not in unfit and i not in uncut}

    def tokenised(self, texts: Sequence[str]) -> list[TextTokens]:
        """Tokenise texts; what two of them have in common is known to the next call too."""
        cut = [self._pieces(text) for text in texts]
        n_uses = Counter(chain.from_iterable(cut))
        new = [piece for piece in n_uses if piece not in self._known]
        ids = self._known | dict(zip(new, piece_ids(new, self._tokenizer), strict=True))
        self._known = {piece: ids[piece] for piece, n in n_uses.items() if n > 1}
        return [TextTokens(pieces, [ids[piece] for piece in pieces]) for pieces in cut]

    def _pieces(self, text: str) -> list[str]:
        if not self._cut_at:
            return [text]
        cuts = [m.start() for m in self._find.finditer(text) if m.group() in self._cut_at]
        starts = cuts if cuts[:1] == [0] else [0, *cuts]
        return [text[begin:end] for begin, end in zip(starts, [*starts[1:], None], strict=True)]
