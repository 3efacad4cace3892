"""Documents to token ids: every token is trained, those of a long one in several sequences.

    start token, tokens of the text, EOS

The start token is what the tokenizer puts in front (BOS), or the one that stands before an empty
prompt. A document longer than the context is cut into sequences that overlap by a token: the last
one of a sequence is what the first trained one of the next is read behind. Each token is trained
once; no document sees another.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from swlora.data.chat_encode import Weighted
from swlora.data.stretches import is_long, long_ids
from swlora.data.tokenise import some_at_a_time, text_bytes, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_documents(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    start_token: int,
    end_token: int,
    context_tokens: int,
) -> list[list[Weighted] | str]:
    """Return the sequences of each text, of at most `context_tokens` >= 2 tokens, or why none."""
    special = set(tokenizer.all_special_ids)
    found: list[list[Weighted] | str] = []
    for part in some_at_a_time(texts, text_bytes):
        of_short = iter(token_ids([t for t in part if not is_long(t)], tokenizer, special=True))
        for text in part:
            ids = long_ids(text, tokenizer) if is_long(text) else next(of_short)
            if isinstance(ids, str):
                found.append(ids)
                continue
            has_start = bool(ids) and ids[0] in special
            whole = [*([] if has_start else [start_token]), *ids, end_token]
            found.append(_pieces(whole, context_tokens))
    return found


def _pieces(ids: list[int], context_tokens: int) -> list[Weighted]:
    step = context_tokens - 1
    parts = [ids[start : start + context_tokens] for start in range(0, len(ids) - 1, step)]
    return [(part, [(1, 0.0), (len(part) - 1, 1.0)]) for part in parts]
