"""Tokens that a tokenizer writes and the model has no embedding for.

Gemma 3's text models have one: `<image_soft_token>`, which only their siblings that see can read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from swlora.data.encode import Encoded
from swlora.data.examples import Example
from swlora.errors import DataError, UserError

_BLOCK_TOKENS = 1 << 20  # looked at at a time


def check_sequences(
    encoded: Encoded, examples: Sequence[Example], tokenizer: Any, n_embeddings: int
) -> None:
    """Raise DataError where a sequence holds a token that is not one of `n_embeddings`.

    `examples` are those that were encoded.
    """
    sequences = encoded.sequences
    for start in range(0, len(sequences.tokens), _BLOCK_TOKENS):
        block = sequences.tokens[start : start + _BLOCK_TOKENS]
        beyond = np.flatnonzero(block >= n_embeddings)
        if not len(beyond):
            continue
        sequence = int(np.searchsorted(sequences.offsets, start + beyond[0], side="right")) - 1
        number = int(encoded.example_ids[sequence])
        place = examples[number].place_or_row(number)
        token = _name(tokenizer, int(block[beyond[0]]))
        raise DataError(
            f"{place} holds {token}, which this model has no embedding for: take it out of the row"
        )


def check_prompts(prompts: Sequence[Sequence[int]], tokenizer: Any, n_embeddings: int) -> None:
    """Raise UserError where token ids of a text hold one that is not one of `n_embeddings`."""
    for prompt in prompts:
        if (highest := max(prompt, default=0)) >= n_embeddings:
            token = _name(tokenizer, highest)
            raise UserError(f"a text holds {token}, which this model has no embedding for")


def _name(tokenizer: Any, token_id: int) -> str:
    return f"the token {tokenizer.convert_ids_to_tokens(token_id)!r}"
