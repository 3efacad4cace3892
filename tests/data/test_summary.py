"""Summaries against counting by hand, and the nodes of groups against the trees themselves."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.summaries import CATS, SUMMARY
from tests.support.tries import Weighted, weighted_sets

from swlora.data.encode import Encoded, encode_examples
from swlora.data.examples import Example
from swlora.data.prefix_tree import build_tree, count_group_nodes, count_nodes
from swlora.data.summary import (
    DataSummary,
    doubtful_facts,
    short_lines,
    summarise_split,
    summarise_steps,
)
from swlora.data.token_sequences import TokenSequences
from swlora.result_json import as_json, from_json

ROWS = [Example("the cat sat", " on the."), Example("the cat sat", " on a."), Example("ran", "off")]


def encoded(sequences: TokenSequences, example_ids: list[int], n_cut: int = 0) -> Encoded:
    return Encoded(sequences, np.array(example_ids, dtype=np.int64), n_cut, {})


@given(weighted_sets, st.data())
def test_the_nodes_of_groups_are_those_of_their_trees(weighted: list[Weighted], data) -> None:
    sequences = TokenSequences.from_weighted(weighted)
    order = data.draw(st.permutations(range(len(sequences))))
    cuts = sorted(data.draw(st.sets(st.sampled_from(order))) - {0})
    groups = [ids for ids in np.split(np.array(order), cuts) if len(ids)]
    expected = [len(build_tree(sequences, ids).token_ids) for ids in groups]
    assert count_group_nodes(sequences, groups).tolist() == expected
    assert count_group_nodes(sequences, [np.array(order)]).tolist() == [count_nodes(sequences)]


def test_a_split_by_hand() -> None:
    found = summarise_split("train", encoded(CATS, [0, 1, 2], 4), ROWS, 100)
    assert (found.n_rows, found.n_sequences, found.n_prompts, found.n_rows_sharing) == (3, 3, 2, 2)
    assert (found.n_tokens, found.n_trained_tokens, found.trained_share) == (17, 8, 8 / 17)
    assert (found.median_tokens, found.p95_tokens, found.longest_tokens) == (6, 6, 6)
    assert (found.n_cut, found.context_tokens) == (4, 100)


def test_only_examples_that_became_sequences_count() -> None:
    """The first of four was left out, the second became two sequences."""
    rows = [Example("x", "y"), Example("x", "y"), Example("x", "y"), Example("x", "z")]
    sequences = TokenSequences.from_lists([([1], [2] * n) for n in (1, 2, 3, 40)])
    found = summarise_split("dev", encoded(sequences, [1, 1, 2, 3]), rows, 100)
    assert (found.n_rows, found.n_sequences) == (3, 4)
    assert (found.n_prompts, found.n_rows_sharing) == (1, 3)
    assert (found.median_tokens, found.p95_tokens, found.longest_tokens) == (3, 41, 41)


def test_the_longest_row_counts_as_it_was_before_it_was_cut(tiny_tokenizer) -> None:
    rows = [Example("p", "c" * n) for n in (1, 1, 1, 40)]
    cut = encode_examples(rows, "", tiny_tokenizer, context_tokens=9, truncate=True)
    found = summarise_split("train", cut, rows, 9)
    assert (found.n_cut, found.median_tokens, found.longest_tokens) == (1, 3, 1 + 40 + 1)
    assert found.n_tokens == 3 * 3 + 9


def test_only_the_most_frequent_reasons_are_listed() -> None:
    reasons = {f"reason {k}": 20 - k for k in range(12)}
    facts = doubtful_facts(replace(SUMMARY, bad_rows=reasons))
    found = [said for name, said in facts if name == "bad rows"]
    listed = [f"{20 - k}: reason {k}" for k in range(8)]
    assert found == [*listed, f"{12 + 11 + 10 + 9}: other reasons"]


def test_tokens_of_a_fractional_weight_are_trained() -> None:
    sequences = TokenSequences.from_weighted([([1, 2, 3, 4], [0, 0.25, 0, 2])])
    found = summarise_split("train", encoded(sequences, [0]), ROWS[:1], 9)
    assert (found.n_trained_tokens, found.trained_share) == (2, 0.5)


def test_the_steps_of_the_cats() -> None:
    one = summarise_steps(CATS, [[np.array([2, 0, 1])]])
    assert (one.n_steps, one.sequences_per_step, one.n_nodes) == (1, 3, 8)
    assert (one.nodes_per_step, one.ideal_ratio) == (8, 17 / 8)
    apart = summarise_steps(CATS, [[np.array([2]), np.array([0])], [np.array([1])]])
    assert (apart.n_steps, apart.sequences_per_step, apart.n_nodes) == (2, 1.5, 14)
    assert (apart.nodes_per_step, apart.ideal_ratio) == (7, 17 / 14)


@pytest.mark.parametrize("has_steps", [True, False])
def test_a_summary_comes_back_from_json_and_is_said_in_lines(has_steps: bool) -> None:
    summary = DataSummary(
        train=summarise_split("train", encoded(CATS, [0, 0, 1]), ROWS[:2], 100),
        n_duplicates=1,
        n_leaked=3,
        bad_rows={"its prompt is empty": 2},
        steps=summarise_steps(CATS, [[np.array([2, 0, 1])]]) if has_steps else None,
    )
    assert from_json(DataSummary, as_json(summary)) == summary
    lines = [
        "to train on: 2 rows of 1 prompt, 3 sequences; 17 tokens, 47.1% trained; tokens a "
        "sequence: 6 median, 6 p95, 6 longest, of a context of 100",
        "steps: 1 an epoch, of 3.0 sequences and 8 tree nodes; tokens : nodes = 2.12",
        "training rows that repeat an earlier one: 1",
        "training rows with a prompt of dev or test: 3",
    ]
    assert short_lines(summary) == [line for line in lines if has_steps or "nodes" not in line]
