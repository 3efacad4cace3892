"""Dealing a step to several processes: every sequence once, equal work, equal numbers of trees."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.support.sequences import branching, deep
from tokenizers import Tokenizer

from swlora.data.dealing import Share, deal, deal_by_size
from swlora.data.prefix_tree import build_tree, count_group_nodes
from swlora.data.steps import StepOrder, cut_group, plan_steps
from swlora.data.token_sequences import TokenSequences

Encode = Callable[[str], list[int]]


def dealt(sequences: TokenSequences, groups: list[np.ndarray], n: int, most: int) -> list[Share]:
    return deal(sequences, groups, n, lambda ids: cut_group(sequences, ids, most))


def steps_of(
    sequences: TokenSequences, size: int, order: StepOrder = "prompts", most: int = 4096
) -> list[list[np.ndarray]]:
    return plan_steps(
        sequences,
        sequences_per_step=size,
        max_tokens_per_tree=most,
        order=order,
        seed=1,
        epoch=0,
    )


@pytest.mark.parametrize("order", ["prompts", "pairs", "neighbours", "iid"])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(("made", "most"), [(branching, 40), (branching, 4096), (deep, 150)])
def test_every_sequence_is_dealt_once_in_as_many_trees(made, most, n, order):
    sequences = TokenSequences.from_lists(made())
    for groups in steps_of(sequences, 9, order, most):
        shares = dealt(sequences, groups, n, most)
        assert len(shares) == n
        given = [i for share in shares for ids in share.groups for i in ids.tolist()]
        assert sorted(given) == sorted(np.concatenate(groups).tolist())
        assert len({len(share.groups) + share.n_empty for share in shares}) == 1
        for share in shares:
            trees = [build_tree(sequences, ids) for ids in share.groups]
            assert share.n_nodes == sum(len(tree.token_ids) for tree in trees)
            if share.n_empty:  # nothing of it can be divided
                assert all(len(ids) == 1 for ids in share.groups)
            for ids, tree in zip(share.groups, trees, strict=True):
                assert len(tree.token_ids) <= most or len(ids) == 1


def test_a_step_of_one_sequence_leaves_the_others_empty():
    sequences = TokenSequences.from_lists([([1, 2], [3]), ([1, 2], [4, 5])])
    shares = dealt(sequences, [np.array([1])], 3, 64)
    assert sorted((len(s.groups), s.n_empty, s.n_nodes) for s in shares) == [
        (0, 1, 0),
        (0, 1, 0),
        (1, 0, 3),
    ]


def test_one_prompt_is_divided_and_run_twice():
    """Eight completions of 10 nodes behind a prompt of 50: 4 and 4, with the prompt in both."""
    pairs = [(list(range(100, 150)), [k, *range(10)]) for k in range(8)]
    sequences = TokenSequences.from_lists(pairs)
    shares = dealt(sequences, [np.arange(8)], 2, 4096)
    assert [share.n_nodes for share in shares] == [90, 90]


def test_long_and_short_sequences_are_dealt_by_their_lengths():
    """Lengths 8, 7, 6, 5, 4 in any order: two processes run 15 nodes each at best (8 + 7)."""
    pairs = [([10 * n], [1] * n) for n in (4, 8, 5, 7, 6)]
    shares = dealt(TokenSequences.from_lists(pairs), [np.arange(5)], 2, 4096)
    assert sorted(share.n_nodes for share in shares) == [15, 15]


@pytest.fixture(scope="module")
def encode(shared_dir: Path) -> Encode:
    tokenizer = Tokenizer.from_file(str(shared_dir / "gpt2-tokenizer" / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text).ids)


@pytest.mark.parametrize("order", ["prompts", "neighbours", "iid"])
@pytest.mark.parametrize("as_chats", [False, True])
def test_eight_processes_have_equal_work(as_chats, order, encode, shared_dir):
    """E2E as it is, and as chats of two answers behind a system turn: 512 examples a step."""
    with (shared_dir / "e2e-dataset" / "trainset.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:2049]
    if as_chats:
        system = "Describe the restaurant in a sentence or two, by these facts alone.\n"
        turns = [(f"{system}user: {mr}\n", text) for mr, text in rows]
        rows = [
            (prompt, f"{text}\nuser: Say it in other words.\n{again}")
            for (prompt, text), (_, again) in zip(turns, rows[1:] + rows[:1], strict=True)
        ]
    pairs = [(encode(f"{prompt}\n"), encode(text)) for prompt, text in rows]
    sequences = TokenSequences.from_lists(pairs)
    for groups in steps_of(sequences, 512, order):
        nodes = [share.n_nodes for share in dealt(sequences, groups, 8, 4096)]
        assert max(nodes) <= 1.05 * sum(nodes) / 8
        whole = int(count_group_nodes(sequences, groups).sum())
        assert sum(nodes) <= 1.02 * whole  # few prefixes are computed twice


@pytest.mark.parametrize("n_shares", [1, 2, 3, 7])
def test_work_is_dealt_by_its_size(n_shares):
    sizes = [5, 1, 30, 4, 4, 9, 2, 2, 1, 12]
    share_of = deal_by_size(sizes, n_shares)
    filled = np.bincount(share_of, weights=sizes, minlength=n_shares)
    assert len(share_of) == len(sizes)
    assert len(filled) == n_shares
    # No share is larger than the mean by more than what it was given last.
    assert filled.max() <= max(30, sum(sizes) / n_shares + max(s for s in sizes if s < 30))
    assert deal_by_size([3, 3, 3, 3], 2).tolist() == [0, 1, 0, 1]
    assert deal_by_size([7], 3).tolist() == [0]
    assert deal_by_size([], 2).tolist() == []
