"""Documents: every token is trained once, long ones in pieces, none sees another."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tests.support.gradients import measure
from tests.support.labelled_loss import adapted, assert_close, oracle
from tests.support.models import MakeModel
from tests.support.tokenizers import EOS, byte_tokenizer

from swlora.adapters.methods import trainable_parameters
from swlora.data import documents, tokenise
from swlora.data.encode import encode_examples
from swlora.data.examples import Example
from swlora.training.step import TreeStep


def pieces(texts: list[str], context_tokens: int, tokenizer: Any) -> list[list[int]]:
    rows = [Example(text=text) for text in texts]
    found = encode_examples(rows, "\n", tokenizer, context_tokens=context_tokens, truncate=False)
    sequences = found.sequences
    own = [
        sequences.tokens[sequences.offsets[i] : sequences.offsets[i + 1]].tolist()
        for i in range(len(sequences))
    ]
    for i, ids in enumerate(own):
        weights = sequences.weights[sequences.offsets[i] : sequences.offsets[i + 1]].tolist()
        assert weights == [0, *[1] * (len(ids) - 1)]
    assert found.n_cut == 0
    return own


@pytest.mark.parametrize("context_tokens", [2, 3, 4, 5, 9])
def test_every_token_is_trained_once(context_tokens: int) -> None:
    for text in ("a", "abc", "abcdefg"):
        own = pieces([text], context_tokens, byte_tokenizer())
        assert all(2 <= len(ids) <= context_tokens for ids in own)
        assert own[0][0] == EOS  # what stands before an empty prompt
        assert [id_ for ids in own for id_ in ids[1:]] == [*text.encode(), EOS]
        assert all(after[0] == before[-1] for before, after in pairwise(own))


def test_a_tokenizer_with_a_start_token_puts_it_there_once() -> None:
    tokenizer = byte_tokenizer("<s> $A", bos_token="<s>")
    (ids,) = pieces(["ab"], 99, tokenizer)
    assert ids == [*tokenizer("ab")["input_ids"], EOS] and len(ids) == 4


def test_documents_are_tokenised_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, sizes = byte_tokenizer(), []

    def token_ids(texts: list[str], *arguments: Any, **options: Any) -> list[list[int]]:
        sizes.append(len(texts))
        return tokenise.token_ids(texts, *arguments, **options)

    monkeypatch.setattr(documents, "token_ids", token_ids)
    whole = pieces(["ab", "cde", "f", "g"], 99, tokenizer)
    monkeypatch.setattr(tokenise, "BYTES_AT_ONCE", 4)
    assert pieces(["ab", "cde", "f", "g"], 99, tokenizer) == whole
    assert sizes == [4, 2, 2]


def test_documents_do_not_see_each_other(make_model: MakeModel) -> None:
    """Loss and gradients of documents in one tree are those of each by itself in transformers."""
    examples = [Example(text=text) for text in ("A text.", "A text of more", "Another", "A text.")]
    sequences = encode_examples(
        examples, "", byte_tokenizer(), context_tokens=9, truncate=False
    ).sequences
    bounds = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    data = [
        (sequences.tokens[a:b].tolist(), sequences.weights[a:b].astype(float).tolist())
        for a, b in bounds
    ]
    model = adapted(make_model, "llama")
    found = measure(
        TreeStep(model, sequences), trainable_parameters(model), [np.arange(len(sequences))]
    )
    assert found.n_tokens == sum(len(example.text) + 1 for example in examples)
    assert_close(found, oracle(model, data))
