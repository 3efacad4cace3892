"""One example as it is encoded for a training, apart into what is shown and what is trained."""

from typing import Any

from swlora.data.encode import encode_examples
from swlora.data.examples import Example

ANY_LENGTH = 1 << 20


def encode_example(example: Example, separator: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return (prompt ids, completion ids with their end) of a data set of one example."""
    encoded = encode_examples(
        [example], separator, tokenizer, context_tokens=ANY_LENGTH, truncate=False
    )
    sequences = encoded.sequences
    assert (len(sequences), encoded.n_cut) == (1, 0)
    ids, n_prompt = sequences.tokens.tolist(), int(sequences.prompt_lengths[0])
    return ids[:n_prompt], ids[n_prompt:]
