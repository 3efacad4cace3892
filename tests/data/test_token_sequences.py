"""Tokenised data sets: what is refused, and how parts are joined."""

import errno
import os
from itertools import pairwise, takewhile
from operator import eq

import numpy as np
import pytest
from hypothesis import given, settings
from tests.support.tries import Pair, Weighted, data_sets, many_prompts, weighted_sets

from swlora.data import scratch, token_sequences
from swlora.data.token_sequences import TokenSequences, common_with_previous
from swlora.errors import DataError, RunFailedError, UserError


def test_token_sequences_from_lists() -> None:
    sequences = TokenSequences.from_lists([([1, 2], [3]), ([4], [5, 6, 7])])
    assert sequences.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert sequences.offsets.tolist() == [0, 3, 7]
    assert sequences.weights.tolist() == [0, 0, 1, 0, 1, 1, 1]
    assert sequences.prompt_lengths.tolist() == [2, 1]
    assert (len(sequences), sequences.length(0), sequences.length(1)) == (2, 3, 4)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([1], [2]), ([], [2])], "sequence 1 has no prompt token"),
        ([([1], [2]), ([1], [2]), ([1], [])], "sequence 2 has no completion token"),
        ([], "no sequences"),
    ],
)
def test_unusable_lists_are_named(pairs: list[Pair], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenSequences.from_lists(pairs)


def arrays(
    offsets: list[int],
    trained: list[float],
    token_type: type = np.int32,
    offset_type: type = np.int64,
    weight_type: type = np.bool_,
) -> TokenSequences:
    flat = np.zeros(6, dtype=token_type)
    return TokenSequences(flat, np.array(offsets, offset_type), np.array(trained, weight_type))


def test_arrays_that_do_not_fit_are_refused() -> None:
    trained = [0, 1, 0, 1, 1, 1]
    assert len(arrays([0, 2, 6], trained)) == 2
    with pytest.raises(DataError, match="sequence 1 has no completion token"):
        arrays([0, 2, 6], [0, 1, 0, 0, 0, 0])
    with pytest.raises(DataError, match="sequence 0 has no prompt token"):
        arrays([0, 2, 6], [1, 1, 0, 1, 1, 1])
    with pytest.raises(DataError, match="sequence 1 has no prompt token"):
        arrays([0, 2, 6], [0, 1, 0.5, 1, 1, 1], weight_type=np.float32)
    for empty, offsets in enumerate(([0, 0, 2, 6], [0, 2, 2, 6], [0, 2, 6, 6])):
        with pytest.raises(DataError, match=f"sequence {empty} has no completion token"):
            arrays(offsets, trained)
    for offsets in ([0, 2, 5], [1, 2, 6]):
        with pytest.raises(ValueError, match="offsets"):
            arrays(offsets, trained)
    with pytest.raises(ValueError, match="weights must have one entry for every token"):
        arrays([0, 2, 6], trained[1:])
    with pytest.raises(ValueError, match="tokens must be one-dimensional int32"):
        arrays([0, 2, 6], trained, token_type=np.int64)
    with pytest.raises(ValueError, match="offsets must be one-dimensional int64"):
        arrays([0, 2, 6], trained, offset_type=np.int32)
    with pytest.raises(ValueError, match="weights must be one-dimensional bool or float32"):
        arrays([0, 2, 6], trained, weight_type=np.uint8)
    for wrong in (-0.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="weights must be finite numbers and none below 0"):
            arrays([0, 2, 6], [*trained[:5], wrong], weight_type=np.float32)


@pytest.mark.parametrize("memory_bytes", [0, 1000, 1 << 20])
def test_joined_parts_are_the_whole_wherever_the_tokens_lie(memory_bytes, monkeypatch, tmp_path):
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(scratch, "MEMORY_BYTES", memory_bytes)
    pairs = many_prompts()
    whole = TokenSequences.from_lists(pairs)
    parts = (
        TokenSequences.from_lists(pairs[start : start + 7]) for start in range(0, len(pairs), 7)
    )
    joined = TokenSequences.joined(parts)
    assert isinstance(joined.tokens, np.memmap) == (memory_bytes < whole.tokens.nbytes)
    assert isinstance(joined.weights, np.memmap) == isinstance(joined.tokens, np.memmap)
    assert joined.weights.dtype == np.bool_
    for name in ("tokens", "offsets", "weights"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory_bytes", [0, 40, 1 << 20])
@given(data=weighted_sets)
@settings(max_examples=40, deadline=None)
def test_joined_weights_are_those_of_the_parts(memory_bytes: int, data: list[Weighted]) -> None:
    """Parts with fractions and parts without, in any order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "MEMORY_BYTES", memory_bytes)
        patch.setattr(scratch, "_COPIED_AT_ONCE", 5)
        joined = TokenSequences.joined(TokenSequences.from_weighted([one]) for one in data)
    whole = TokenSequences.from_weighted(data)
    assert joined.weights.dtype == whole.weights.dtype
    assert joined.weights.tolist() == whole.weights.tolist()
    assert joined.tokens.tolist() == whole.tokens.tolist()
    has_fractions = any(w not in (0, 1) for _, weights in data for w in weights)
    assert (whole.weights.dtype == np.float32) == has_fractions


@pytest.mark.parametrize("block_tokens", [1, 2, 7, 1 << 20])
@given(data=weighted_sets)
@settings(max_examples=40, deadline=None)
def test_the_prompt_ends_before_the_first_trained_token(
    block_tokens: int, data: list[Weighted]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_sequences, "_BLOCK_TOKENS", block_tokens)
        sequences = TokenSequences.from_weighted(data)
    expected = [next(i for i, w in enumerate(weights) if w) for _, weights in data]
    assert sequences.prompt_lengths.tolist() == expected


def test_weights_that_do_not_fit_are_refused() -> None:
    for data, message in (
        ([([1, 2], [0, 1]), ([1, 2], [1, 1])], "sequence 1 has no prompt token"),
        ([([1, 2, 3], [0, 0, 0])], "sequence 0 has no completion token"),
        ([([1, 2], [0, 1]), ([], [])], "sequence 1 has no completion token"),
        ([([1, 2], [0, 1, 1])], "sequence 0 has 2 tokens and 3 weights"),
        ([([1, 2], [0, -1])], "none below 0"),
        ([], "no sequences"),
    ):
        with pytest.raises((UserError, ValueError), match=message):
            TokenSequences.from_weighted(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("cells", [1, 40, 400])
@given(pairs=data_sets)
@settings(max_examples=60, deadline=None)
def test_ranks_sort_the_data_however_it_is_read(cells: int, pairs: list[Pair]) -> None:
    """Few columns at a time, whose number changes as sequences drop out, and blocks of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_sequences, "_CELLS", cells)
        patch.setattr(token_sequences, "_BLOCK_SEQUENCES", 3)
        sequences = TokenSequences.from_lists(pairs)
        prompt, context = sequences.ranks
        contexts = [(p + c)[:-1] for p, c in pairs]
        for ranks, texts in ((prompt, [p for p, _ in pairs]), (context, contexts)):
            in_order = sorted(set(map(tuple, texts)))
            assert [in_order[rank] for rank in ranks.tolist()] == [*map(tuple, texts)]
        common = common_with_previous(sequences, np.arange(len(pairs)))
    expected = [
        sum(takewhile(bool, map(eq, before, after))) for before, after in pairwise(contexts)
    ]
    assert common.tolist() == [0, *expected]


def test_tokens_that_do_not_fit_on_the_disk_are_said(monkeypatch, tmp_path):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(scratch, "MEMORY_BYTES", 0)
    for name in ("write", "fsync"):  # a network's file system may say so late
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(RunFailedError, match=r"cannot keep the tokens in .* No space"):
                TokenSequences.joined([TokenSequences.from_lists([([1], [2])])])


def test_a_hash_sees_tokens_lengths_and_weights_however_they_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(token_sequences, "_BLOCK_TOKENS", 2)
    tokens, trained = [1, 2, 3, 4, 5], [False, True, False, True, True]

    def sha256(tokens: list[int], offsets: list[int], weights: list[float], kind: type) -> str:
        parts = (np.array(tokens, np.int32), np.array(offsets), np.array(weights, kind))
        return TokenSequences(*parts).sha256()

    one = sha256(tokens, [0, 2, 5], trained, np.bool_)
    assert one == sha256(tokens, [0, 2, 5], trained, np.float32)
    others = [
        sha256([1, 2, 3, 4, 6], [0, 2, 5], trained, np.bool_),
        sha256(tokens, [0, 5], trained, np.bool_),
        sha256(tokens, [0, 2, 5], [0, 1, 0, 1, 0], np.bool_),
        sha256(tokens, [0, 2, 5], [0, 1, 0, 1, 0.5], np.float32),
    ]
    assert len({one, *others}) == 5
    monkeypatch.setattr(token_sequences, "_BLOCK_TOKENS", 1 << 20)
    assert sha256(tokens, [0, 2, 5], trained, np.bool_) == one
