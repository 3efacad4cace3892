"""Tokens that a tokenizer writes and the model has no embedding for.

Gemma 3's text models have one: `<image_soft_token>`, which only their siblings that see can read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from swlora.data.token_sequences import TokenSequences
from swlora.errors import DataError, UserError


def check_sequences(sequences: TokenSequences, tokenizer: Any, n_embeddings: int) -> None:
    """Raise DataError where a sequence holds a token that is not one of `n_embeddings`."""
    beyond = np.flatnonzero(sequences.tokens >= n_embeddings)
    if len(beyond):
        row = int(np.searchsorted(sequences.offsets, beyond[0], side="right"))
        token = _name(tokenizer, int(sequences.tokens[beyond[0]]))
        raise DataError(f"row {row} holds {token}, which this model has no embedding for")


def check_prompts(prompts: Sequence[Sequence[int]], tokenizer: Any, n_embeddings: int) -> None:
    """Raise UserError where token ids of a text hold one that is not one of `n_embeddings`."""
    for prompt in prompts:
        if (highest := max(prompt, default=0)) >= n_embeddings:
            token = _name(tokenizer, highest)
            raise UserError(f"a text holds {token}, which this model has no embedding for")


def _name(tokenizer: Any, token_id: int) -> str:
    return f"the token {tokenizer.convert_ids_to_tokens(token_id)!r}"
