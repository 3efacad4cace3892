"""The groups that kept states are computed in: a partition of the trie, whatever the data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tries import Pair, data_sets

from swlora.data import fixed_groups as module
from swlora.data.fixed_groups import MAX_REPEATED_SHARE, FixedGroups, fixed_groups
from swlora.data.prefix_tree import build_tree, count_nodes, number_nodes
from swlora.data.token_sequences import TokenSequences


def cut(pairs: list[Pair], nodes: int, most: int = 4096) -> tuple[TokenSequences, FixedGroups]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_NODES", nodes)
        patch.setattr(module, "MAX_TREE_NODES", most)
        sequences = TokenSequences.from_lists(pairs)
        return sequences, fixed_groups(sequences)


@settings(max_examples=60, deadline=None)
@given(data_sets, st.integers(1, 40), st.integers(1, 60))
def test_every_node_has_one_owner_that_computes_it(
    pairs: list[Pair], nodes: int, most: int
) -> None:
    sequences, groups = cut(pairs, nodes, most)
    numbers, n_groups = number_nodes(sequences), len(groups.n_shared)
    assert sorted(groups.order.tolist()) == list(range(len(pairs)))
    assert (groups.first_node[0], groups.first_node[-1]) == (0, count_nodes(sequences))
    for group in range(n_groups):
        tree = build_tree(sequences, groups.sequence_ids(group))
        found, n_shared = numbers[tree.node_source], groups.n_shared[group]
        own = np.arange(groups.first_node[group], groups.first_node[group + 1])
        assert len(own) and np.array_equal(found[n_shared:], own)
        assert (found[:n_shared] < own[0]).all()
        assert groups.owners(own).tolist() == [group]
        first = groups.sequence_ids(group)[0]
        assert len(found) <= max(most, sequences.lengths[first] - 1)
    assert groups.owners(np.arange(count_nodes(sequences))).tolist() == list(range(n_groups))
    assert not len(groups.owners(np.array([], dtype=np.int64)))


def test_groups_follow_the_tokens_and_not_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    pairs = [([1, n // 4], rng.integers(0, 9, 6).tolist()) for n in range(40)]
    _, groups = cut(pairs, 20)
    shuffled = [pairs[i] for i in rng.permutation(40)]
    _, again = cut(shuffled, 20)
    assert len(groups.n_shared) > 4
    for name in ("first_sequence", "first_node", "n_shared"):
        assert np.array_equal(getattr(groups, name), getattr(again, name))


def test_little_is_computed_twice_under_a_long_prompt_that_all_share() -> None:
    pairs = [(list(range(100)), [200 + n, *range(20), n]) for n in range(200)]
    _, groups = cut(pairs, 64)
    own = np.diff(groups.first_node)
    assert len(own) > 2
    assert (groups.n_shared[1:] <= own[:-1] * MAX_REPEATED_SHARE).all()
    _, bounded = cut(pairs, 64, most=400)  # memory counts more
    assert (bounded.n_shared + np.diff(bounded.first_node) <= 400).all()


def test_short_sequences_without_a_prompt_in_common_share_a_group() -> None:
    _, groups = cut([([n], [n, n, 1]) for n in range(300)], 64)
    assert np.diff(groups.first_node).tolist() == [66] * 13 + [42]
