"""Prefix trees against tries of plain dictionaries."""

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


def visible(tree: PrefixTree, i: int) -> list[int]:
    return [j for j in range(len(tree.token_ids)) if j <= i < tree.subtree_end[j]]


def paths(tree: PrefixTree) -> list[tuple[int, ...]]:
    """Each node's tokens from the root, read off by its visibility alone."""
    return [tuple(tree.token_ids[visible(tree, i)].tolist()) for i in range(len(tree.token_ids))]


def naive_targets(pairs: list[Pair]) -> Counter[tuple[tuple[int, ...], int]]:
    counts: Counter[tuple[tuple[int, ...], int]] = Counter()
    for prompt, completion in pairs:
        text = prompt + completion
        for place in range(len(prompt), len(text)):
            counts[tuple(text[:place]), text[place]] += 1
    return counts


def tree_targets(tree: PrefixTree) -> dict[tuple[tuple[int, ...], int], float]:
    path = paths(tree)
    triples = zip(tree.target_position, tree.target_id, tree.target_weight, strict=True)
    listed = [((path[position], int(token)), float(weight)) for position, token, weight in triples]
    assert len(dict(listed)) == len(listed), "a target is listed twice"
    return dict(listed)


def assert_tree_is_the_trie(tree: PrefixTree, pairs: list[Pair]) -> None:
    path = paths(tree)
    assert set(path) == proper_prefixes(pairs)
    assert len(set(path)) == len(path), "a prefix has two nodes"
    assert tree.position_ids.tolist() == [len(p) - 1 for p in path]
    node = {p: i for i, p in enumerate(path)}
    for prompt, completion in pairs:
        context = (prompt + completion)[:-1]
        chain = [node[tuple(context[: end + 1])] for end in range(len(context))]
        assert visible(tree, chain[-1]) == chain
    assert tree_targets(tree) == naive_targets(pairs)
    assert tree.n_target_tokens == sum(len(completion) for _, completion in pairs)
    assert tree.n_sequences == len(pairs)


@given(data_sets)
@settings(max_examples=150, deadline=None)
def test_tree_is_the_naive_trie(pairs: list[Pair]) -> None:
    _, tree = everything(pairs)
    assert_tree_is_the_trie(tree, pairs)
    assert sorted(tree.sequence_ids.tolist()) == list(range(len(pairs)))


@given(data_sets, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_tree_of_a_subset_depends_on_no_order_of_ids(pairs, random) -> None:
    ids = random.sample(range(len(pairs)), random.randint(1, len(pairs)))
    sequences = TokenSequences.from_lists(pairs)
    tree = build_tree(sequences, np.array(ids))
    assert_tree_is_the_trie(tree, [pairs[i] for i in ids])
    other = build_tree(sequences, np.array(sorted(ids)))
    for name in ("token_ids", "position_ids", "subtree_end", "target_position", "target_id"):
        np.testing.assert_array_equal(getattr(tree, name), getattr(other, name))
    np.testing.assert_array_equal(tree.target_weight, other.target_weight)


@given(weighted_sets)
@settings(max_examples=150, deadline=None)
def test_targets_carry_the_sums_of_the_weights(data: list[Weighted]) -> None:
    sequences = TokenSequences.from_weighted(data)
    tree = build_tree(sequences, np.arange(len(data)))
    expected: Counter[tuple[tuple[int, ...], int]] = Counter()
    for ids, weights in data:
        for place, weight in enumerate(weights):
            expected[tuple(ids[:place]), ids[place]] += weight  # type: ignore[assignment]
    assert tree_targets(tree) == {target: weight for target, weight in expected.items() if weight}
    assert tree.n_target_tokens == sum(sum(weights) for _, weights in data)
    assert set(paths(tree)) == proper_prefixes([(ids, []) for ids, _ in data])


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
    tree = build_tree(sequences, np.array(ids))
    at_token = paths_of_tokens(sequences)
    assert [at_token[source] for source in tree.node_source] == paths(tree)
    owner = np.searchsorted(sequences.offsets, tree.node_source, side="right") - 1
    assert set(owner.tolist()) <= set(ids)
    # So nodes of different trees that hold the same context have the same number.
    numbers, n_nodes = number_nodes(sequences), count_nodes(sequences)
    _, whole = everything(pairs)
    number_of = dict(zip(paths(whole), numbers[whole.node_source].tolist(), strict=True))
    assert numbers[tree.node_source].tolist() == [number_of[path] for path in paths(tree)]
    assert len(set(number_of.values())) == n_nodes == len(whole.token_ids)


def test_numbers_and_sources_by_hand() -> None:
    # Sorted contexts: 3 | 7 8 | 7 8 5 | 7 8 5 6, so the nodes are 3, 7, 8, 5, 6.
    pairs = [([7, 8], [5, 6, 9]), ([7, 8], [5]), ([3], [9]), ([7, 8, 5], [9])]
    sequences, tree = everything(pairs)
    numbers, n_nodes = number_nodes(sequences), count_nodes(sequences)
    assert n_nodes == 5
    assert numbers.tolist() == [1, 2, 3, 4, -1, 1, 2, -1, 0, -1, 1, 2, 3, -1]
    assert tree.token_ids.tolist() == [3, 7, 8, 5, 6]
    assert numbers[tree.node_source].tolist() == [0, 1, 2, 3, 4]
    assert sequences.tokens[tree.node_source].tolist() == [3, 7, 8, 5, 6]


def test_tree_by_hand() -> None:
    # 7 8 | 5 6 9    7 8 | 5 9    7 8 5 | 6 9 (trains 6 and 9 only)    3 | 9
    _, tree = everything([([7, 8], [5, 6, 9]), ([7, 8], [5, 9]), ([7, 8, 5], [6, 9]), ([3], [9])])
    assert tree.token_ids.tolist() == [3, 7, 8, 5, 6]
    assert tree.position_ids.tolist() == [0, 0, 1, 2, 3]
    assert tree.subtree_end.tolist() == [1, 5, 5, 5, 5]
    triples = zip(tree.target_position, tree.target_id, tree.target_weight, strict=True)
    assert list(triples) == [(0, 9, 1), (2, 5, 2), (3, 6, 2), (3, 9, 1), (4, 9, 2)]
    dtypes = [tree.token_ids.dtype, tree.position_ids.dtype, tree.subtree_end.dtype]
    assert dtypes == [np.int32] * 3
    assert (tree.target_position.dtype, tree.target_id.dtype) == (np.int64, np.int64)
    assert (tree.target_weight.dtype, tree.sequence_ids.dtype) == (np.float32, np.int64)
    assert (tree.n_sequences, tree.n_target_tokens) == (4, 8)


def test_batch_of_one_duplicates_and_one_token_completions() -> None:
    _, one = everything([([4], [2])])
    assert (one.token_ids.tolist(), one.subtree_end.tolist()) == ([4], [1])
    assert (one.target_position.tolist(), one.target_id.tolist()) == ([0], [2])

    sequences, tree = everything([([4, 1], [2, 0])] * 3)
    assert tree.token_ids.tolist() == [4, 1, 2]
    assert tree.target_weight.tolist() == [3, 3]
    twice = build_tree(sequences, np.array([2, 2]))
    assert twice.target_weight.tolist() == [2, 2]

    _, forest = everything([([4], [2]), ([5], [2]), ([4], [3])])
    assert forest.token_ids.tolist() == [4, 5]
    assert forest.subtree_end.tolist() == [1, 2]
    assert forest.target_position.tolist() == [0, 0, 1]


def test_token_ids_order_as_numbers_up_to_the_largest_int32() -> None:
    largest = 2**31 - 1
    _, tree = everything([([p], [0, 1]) for p in (largest, 256, 255, 65536, 1, 0)])
    assert tree.token_ids.tolist() == [0, 0, 1, 0, 255, 0, 256, 0, 65536, 0, largest, 0]
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
