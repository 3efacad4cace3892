"""The tokens that end a text: a model may name several, and in several places."""

from collections.abc import Iterator
from typing import Any


def find_end_tokens(model: Any, tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """Return the ids of all tokens that end a text, sorted and each once.

    `generation_config.json`, the model's configuration (also one for text inside it) and the
    tokenizer may name one or several. Ids without an embedding are left out: GPT-2's default of
    50256 stays in the configuration of a model with fewer tokens, which can never write it.
    """
    n_embeddings = model.get_input_embeddings().num_embeddings
    config = model.config
    places = (generation_config, config, config.get_text_config(), tokenizer)
    named = {token_id for place in places for token_id in _named(place)}
    return tuple(sorted(token_id for token_id in named if 0 <= token_id < n_embeddings))


def _named(place: Any) -> Iterator[int]:
    ids = getattr(place, "eos_token_id", None)
    for token_id in ids if isinstance(ids, list | tuple) else [ids]:
        if isinstance(token_id, int) and not isinstance(token_id, bool):
            yield token_id
