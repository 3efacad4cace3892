"""Tree rows against tries of plain dictionaries."""

from collections import Counter
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tries import Pair, Weighted, data_sets, proper_prefixes, weighted_sets

from swlora.data.prefix_tree import PrefixTree, build_tree, count_nodes, number_nodes
from swlora.data.token_sequences import TokenSequences
from swlora.errors import DataError


def everything(pairs: list[Pair]) -> tuple[TokenSequences, PrefixTree]:
    sequences = TokenSequences.from_lists(pairs)
    return sequences, build_tree(sequences, np.arange(len(pairs)))


def visible(row: PrefixTree, i: int) -> list[int]:
    return [j for j in range(len(row.token_ids)) if j <= i < row.subtree_end[j]]


def paths(row: PrefixTree) -> list[tuple[int, ...]]:
    """Each node's tokens from the root, read off by its visibility alone."""
    return [tuple(row.token_ids[visible(row, i)].tolist()) for i in range(len(row.token_ids))]


def naive_targets(pairs: list[Pair]) -> Counter[tuple[tuple[int, ...], int]]:
    counts: Counter[tuple[tuple[int, ...], int]] = Counter()
    for prompt, completion in pairs:
        text = prompt + completion
        for place in range(len(prompt), len(text)):
            counts[tuple(text[:place]), text[place]] += 1
    return counts


def row_targets(row: PrefixTree) -> dict[tuple[tuple[int, ...], int], float]:
    path = paths(row)
    triples = zip(row.target_position, row.target_id, row.target_weight, strict=True)
    listed = [((path[position], int(token)), float(weight)) for position, token, weight in triples]
    assert len(dict(listed)) == len(listed), "a target is listed twice"
    return dict(listed)


def assert_row_is_the_trie(row: PrefixTree, pairs: list[Pair]) -> None:
    path = paths(row)
    assert set(path) == proper_prefixes(pairs)
    assert len(set(path)) == len(path), "a prefix has two nodes"
    assert row.position_ids.tolist() == [len(p) - 1 for p in path]
    node = {p: i for i, p in enumerate(path)}
    for prompt, completion in pairs:
        context = (prompt + completion)[:-1]
        chain = [node[tuple(context[: end + 1])] for end in range(len(context))]
        assert visible(row, chain[-1]) == chain
    assert row_targets(row) == naive_targets(pairs)
    assert row.n_target_tokens == sum(len(completion) for _, completion in pairs)
    assert row.n_sequences == len(pairs)


@given(data_sets)
@settings(max_examples=150, deadline=None)
def test_row_is_the_naive_trie(pairs: list[Pair]) -> None:
    _, row = everything(pairs)
    assert_row_is_the_trie(row, pairs)
    assert sorted(row.sequence_ids.tolist()) == list(range(len(pairs)))


@given(data_sets, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_row_of_a_subset_depends_on_no_order_of_ids(pairs, random) -> None:
    ids = random.sample(range(len(pairs)), random.randint(1, len(pairs)))
    sequences = TokenSequences.from_lists(pairs)
    row = build_tree(sequences, np.array(ids))
    assert_row_is_the_trie(row, [pairs[i] for i in ids])
    other = build_tree(sequences, np.array(sorted(ids)))
    for name in ("token_ids", "position_ids", "subtree_end", "target_position", "target_id"):
        np.testing.assert_array_equal(getattr(row, name), getattr(other, name))
    np.testing.assert_array_equal(row.target_weight, other.target_weight)


@given(weighted_sets)
@settings(max_examples=150, deadline=None)
def test_targets_carry_the_sums_of_the_weights(data: list[Weighted]) -> None:
    sequences = TokenSequences.from_weighted(data)
    row = build_tree(sequences, np.arange(len(data)))
    expected: Counter[tuple[tuple[int, ...], int]] = Counter()
    for ids, weights in data:
        for place, weight in enumerate(weights):
            expected[tuple(ids[:place]), ids[place]] += weight  # type: ignore[assignment]
    assert row_targets(row) == {target: weight for target, weight in expected.items() if weight}
    assert row.n_target_tokens == sum(sum(weights) for _, weights in data)
    assert set(paths(row)) == proper_prefixes([(ids, []) for ids, _ in data])


def paths_of_tokens(sequences: TokenSequences) -> list[tuple[int, ...] | None]:
    """Everything up to each token of the data, None for the last token of a sequence."""
    found: list[tuple[int, ...] | None] = []
    for start, end in pairwise(sequences.offsets.tolist()):
        text = tuple(sequences.tokens[start:end].tolist())
        found += [text[: n + 1] for n in range(len(text) - 1)]
        found.append(None)
    return found


@given(data_sets)
@settings(max_examples=150, deadline=None)
def test_nodes_are_numbered_by_everything_up_to_them(pairs: list[Pair]) -> None:
    sequences = TokenSequences.from_lists(pairs)
    numbers, n_nodes = number_nodes(sequences), count_nodes(sequences)
    assert numbers.dtype == np.int64 and len(numbers) == len(sequences.tokens)
    number_of: dict[tuple[int, ...], int] = {}
    for number, path in zip(numbers.tolist(), paths_of_tokens(sequences), strict=True):
        if path is None:
            assert number == -1
        else:
            assert number_of.setdefault(path, number) == number
    assert n_nodes == len(proper_prefixes(pairs))
    assert sorted(number_of.values()) == list(range(n_nodes))


@given(data_sets, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_every_node_says_where_it_was_read(pairs: list[Pair], random: Random) -> None:
    ids = random.sample(range(len(pairs)), random.randint(1, len(pairs)))
    sequences = TokenSequences.from_lists(pairs)
    row = build_tree(sequences, np.array(ids))
    at_token = paths_of_tokens(sequences)
    assert [at_token[source] for source in row.node_source] == paths(row)
    owner = np.searchsorted(sequences.offsets, row.node_source, side="right") - 1
    assert set(owner.tolist()) <= set(ids)
    # So nodes of different rows that hold the same context have the same number.
    numbers, n_nodes = number_nodes(sequences), count_nodes(sequences)
    _, whole = everything(pairs)
    number_of = dict(zip(paths(whole), numbers[whole.node_source].tolist(), strict=True))
    assert numbers[row.node_source].tolist() == [number_of[path] for path in paths(row)]
    assert len(set(number_of.values())) == n_nodes == len(whole.token_ids)


def test_numbers_and_sources_by_hand() -> None:
    # Sorted contexts: 3 | 7 8 | 7 8 5 | 7 8 5 6, so the nodes are 3, 7, 8, 5, 6.
    pairs = [([7, 8], [5, 6, 9]), ([7, 8], [5]), ([3], [9]), ([7, 8, 5], [9])]
    sequences, row = everything(pairs)
    numbers, n_nodes = number_nodes(sequences), count_nodes(sequences)
    assert n_nodes == 5
    assert numbers.tolist() == [1, 2, 3, 4, -1, 1, 2, -1, 0, -1, 1, 2, 3, -1]
    assert row.token_ids.tolist() == [3, 7, 8, 5, 6]
    assert numbers[row.node_source].tolist() == [0, 1, 2, 3, 4]
    assert sequences.tokens[row.node_source].tolist() == [3, 7, 8, 5, 6]


def test_row_by_hand() -> None:
    # 7 8 | 5 6 9    7 8 | 5 9    7 8 5 | 6 9 (trains 6 and 9 only)    3 | 9
    _, row = everything([([7, 8], [5, 6, 9]), ([7, 8], [5, 9]), ([7, 8, 5], [6, 9]), ([3], [9])])
    assert row.token_ids.tolist() == [3, 7, 8, 5, 6]
    assert row.position_ids.tolist() == [0, 0, 1, 2, 3]
    assert row.subtree_end.tolist() == [1, 5, 5, 5, 5]
    triples = zip(row.target_position, row.target_id, row.target_weight, strict=True)
    assert list(triples) == [(0, 9, 1), (2, 5, 2), (3, 6, 2), (3, 9, 1), (4, 9, 2)]
    dtypes = [row.token_ids.dtype, row.position_ids.dtype, row.subtree_end.dtype]
    assert dtypes == [np.int32] * 3
    assert (row.target_position.dtype, row.target_id.dtype) == (np.int64, np.int64)
    assert (row.target_weight.dtype, row.sequence_ids.dtype) == (np.float32, np.int64)
    assert (row.n_sequences, row.n_target_tokens) == (4, 8)


def test_batch_of_one_duplicates_and_one_token_completions() -> None:
    _, one = everything([([4], [2])])
    assert (one.token_ids.tolist(), one.subtree_end.tolist()) == ([4], [1])
    assert (one.target_position.tolist(), one.target_id.tolist()) == ([0], [2])

    sequences, row = everything([([4, 1], [2, 0])] * 3)
    assert row.token_ids.tolist() == [4, 1, 2]
    assert row.target_weight.tolist() == [3, 3]
    twice = build_tree(sequences, np.array([2, 2]))
    assert twice.target_weight.tolist() == [2, 2]

    _, forest = everything([([4], [2]), ([5], [2]), ([4], [3])])
    assert forest.token_ids.tolist() == [4, 5]
    assert forest.subtree_end.tolist() == [1, 2]
    assert forest.target_position.tolist() == [0, 0, 1]


def test_token_ids_order_as_numbers_up_to_the_largest_int32() -> None:
    largest = 2**31 - 1
    _, row = everything([([p], [0, 1]) for p in (largest, 256, 255, 65536, 1, 0)])
    assert row.token_ids.tolist() == [0, 0, 1, 0, 255, 0, 256, 0, 65536, 0, largest, 0]
    _, last = everything([([1], [largest])])
    assert last.target_id.tolist() == [largest]


def test_bad_ids_and_negative_tokens_are_refused() -> None:
    sequences = TokenSequences.from_lists([([1], [2]), ([3], [4]), ([3], [-4])])
    for ids in ([], [3], [-1, 0]):
        with pytest.raises(ValueError, match=r"0\.\.2"):
            build_tree(sequences, np.array(ids, dtype=np.int64))
    assert build_tree(sequences, np.array([0, 1])).n_sequences == 2
    with pytest.raises(DataError, match="sequence 2 holds a negative token"):
        build_tree(sequences, np.array([0, 2]))
