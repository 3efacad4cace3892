"""A long text in stretches that are tokenised one by one: at once it would take much memory.

Text is cut at line breaks, and only where that changes no token. What token a place belongs to is
decided near it: tokenizers first take words, numbers, and runs of punctuation or white space apart,
or else have no token that reaches over this line break. So each place is tried, on the text around
it. Of a line break two places are looked at, since tokenizers differ in where a token ends:

    GPT-2               in front of all its white space, of which it sets the last character apart
    Llama 3, Qwen       behind it: punctuation and the line breaks that follow it are one piece
    Llama 2, Gemma      either; the mark of a word that they put before every text is taken off
"""

import re
from collections.abc import Iterable
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING

from swlora.data import tokenise
from swlora.data.examples import too_long_text
from swlora.data.tokenise import ids_within, text_bytes, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Both ends of the white space are near: what is decided there is seen whole
_LINE_BREAK = re.compile(r"(?<=\S)\s{0,15}\n(?=[^\S\n]{0,99}\S)")
_AROUND = 400  # characters on each side of a place, of which tokens are compared
_MAX_TRIED = 1000  # line breaks, each in a few milliseconds


def is_long(text: str) -> bool:
    """Say that a text is tokenised by itself, in stretches."""
    return text_bytes(text) > tokenise.BYTES_AT_ONCE


def long_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int] | str:
    """Tokenise a long text, a stretch at a time, with the special tokens that belong in front.

    Returns why not where a stretch is too long to be tokenised at once.
    """
    stretches = in_stretches(text, tokenizer)
    longest = max(map(text_bytes, stretches))
    if problem := too_long_text(longest, " without a line break to cut it at"):
        return problem
    ids = token_ids(stretches[:1], tokenizer, special=True)[0]
    for stretch in stretches[1:]:
        ids += ids_within([stretch], tokenizer)[0]
    return ids


def in_stretches(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Cut a text into stretches whose tokens, one behind the other, are those of the text.

    A stretch has about `BYTES_AT_ONCE`; more where the text has no line break to cut at.
    """
    starts = [0]
    while cut := _next_cut(text, starts[-1], tokenizer):
        starts.append(cut)
    return [text[begin:end] for begin, end in pairwise([*starts, len(text)])]


def _next_cut(text: str, start: int, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return where the stretch from `start` on ends; None for at the end of the text."""
    head = text[start : start + tokenise.BYTES_AT_ONCE].encode()[: tokenise.BYTES_AT_ONCE]
    at = start + max(1, len(head.decode(errors="ignore")))
    if at >= len(text):
        return None
    cut = _first_exact(text, _LINE_BREAK.finditer(text, at), start, tokenizer)
    if too_long_text(text_bytes(text[start:cut])):
        earlier = reversed(list(_LINE_BREAK.finditer(text, start, at)))
        return _first_exact(text, earlier, start, tokenizer) or cut
    return cut


def _first_exact(
    text: str,
    breaks: Iterable[re.Match[str]],
    start: int,
    tokenizer: "PreTrainedTokenizerBase",
) -> int | None:
    """Return the first place behind `start` at one of the line breaks where a cut is exact."""
    tried = islice(breaks, _MAX_TRIED)
    places = chain.from_iterable((found.end(), found.start()) for found in tried)
    return next((at for at in places if at > start and _is_exact(text, at, tokenizer)), None)


def _is_exact(text: str, at: int, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Say that the tokens around a place are those of the text before it and of that behind it."""
    left, right = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
    whole, before = token_ids([left + right, left], tokenizer, special=False)
    return whole == before + ids_within([right], tokenizer)[0]
