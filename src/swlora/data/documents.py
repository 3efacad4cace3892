"""Documents to token ids: every token is trained, those of a long one in several sequences.

    start token, tokens of the text, EOS

The start token is what the tokenizer puts in front (BOS), or the one that stands before an empty
prompt. A document longer than the context is cut into sequences that overlap by a token: the last
one of a sequence is what the first trained one of the next is read behind. Each token is trained
once; no document sees another.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from swlora.data.chat_encode import Weighted
from swlora.data.tokenise import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 1 << 20  # tokenised at once: what a tokenizer knows of a token takes 100 bytes


def encode_documents(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    start_token: int,
    end_token: int,
    context_tokens: int,
) -> list[list[Weighted]]:
    """Return the sequences of each text, of at most `context_tokens` >= 2 tokens."""
    special = set(tokenizer.all_special_ids)
    found = []
    for part in _parts(texts):
        for ids in token_ids(part, tokenizer, special=True):
            has_start = bool(ids) and ids[0] in special
            whole = [*([] if has_start else [start_token]), *ids, end_token]
            found.append(_pieces(whole, context_tokens))
    return found


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield texts of about `_CHARACTERS` together, or a longer one."""
    part, n_characters = list[str](), 0
    for text in texts:
        part.append(text)
        n_characters += len(text)
        if n_characters > _CHARACTERS:
            yield part
            part, n_characters = [], 0
    if part:
        yield part


def _pieces(ids: list[int], context_tokens: int) -> list[Weighted]:
    step = context_tokens - 1
    parts = [ids[start : start + context_tokens] for start in range(0, len(ids) - 1, step)]
    return [(part, [(1, 0.0), (len(part) - 1, 1.0)]) for part in parts]
