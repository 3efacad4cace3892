"""The engine with nothing shared: the same loss and gradient as with prefix trees."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from tests.support.gradients import Measured, measure

from benchmarks import flat
from swlora.adapters.methods import adapt, train_mode, trainable_parameters
from swlora.config import AdapterSpec
from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.training import step as training_step
from swlora.training.step import TreeStep


@pytest.fixture
def sequences() -> TokenSequences:
    """Six sequences of two prompts."""
    prompts = [[5, 6, 7, 8], [5, 9]]
    return TokenSequences.from_lists([(p, [10 + i, 11, 12 + i]) for i in range(3) for p in prompts])


def test_no_node_is_shared(sequences: TokenSequences) -> None:
    tree = flat.tree(sequences, np.arange(6))
    assert len(tree.token_ids) == int((sequences.lengths - 1).sum())
    assert len(tree.token_ids) > len(build_tree(sequences, np.arange(6)).token_ids)
    starts = np.flatnonzero(tree.position_ids == 0)
    assert (
        tree.subtree_end.tolist()
        == np.repeat(np.append(starts[1:], len(tree.token_ids)), sequences.lengths - 1).tolist()
    )
    assert sequences.tokens[tree.node_source].tolist() == tree.token_ids.tolist()


def test_groups_hold_what_fits_and_each_sequence_once(sequences: TokenSequences) -> None:
    steps = flat.steps(sequences, [[np.array([0, 2]), np.array([4])], [np.array([1, 3, 5])]], 12)
    assert [[g.tolist() for g in step] for step in steps] == [[[0, 2], [4]], [[1, 3, 5]]]
    assert [g.tolist() for g in flat.steps(sequences, [[np.array([0, 2])]], 3)[0]] == [[0], [2]]


def test_loss_and_gradient_are_those_of_the_trees(
    sequences: TokenSequences, make_model: Callable[..., Any]
) -> None:
    adapted = adapt(make_model("llama"), AdapterSpec(rank=2), [0, 1, 2], seed=0)
    train_mode(adapted.model)
    step, parameters = TreeStep(adapted.model, sequences), trainable_parameters(adapted.model)

    def found(build: Any) -> Measured:
        with patch.object(training_step, "build_tree", build):
            return measure(step, parameters, [np.arange(6)])

    expected, measured = found(build_tree), found(flat.tree)
    assert measured.n_tokens == expected.n_tokens
    assert measured.sum_nats == pytest.approx(expected.sum_nats, rel=1e-5)
    for name, gradient in expected.gradients.items():
        assert (measured.gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
