"""Sequences with several trained spans and with fractions as weights, against transformers + PEFT.

The oracle runs one sequence at a time: transformers' own loss with labels where tokens are trained
or not, a cross-entropy with weights where they are trained in part.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.support.adapters import fill_b
from tests.support.gradients import measure
from tests.support.labelled_loss import (
    Weighted,
    adapted,
    assert_close,
    cross_entropy,
    oracle,
)
from tests.support.models import MakeModel

from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import adapt, train_mode, trainable_parameters
from swlora.config import AdapterSpec, TrainSpec
from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.evaluation.loss import dataset_loss, grouped_losses
from swlora.progress import Silent
from swlora.training.frozen_prefix import PrefixCache
from swlora.training.loop import reports
from swlora.training.plain import PlainStep
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep, make_step

FAMILIES = ["gpt2", "llama", "gemma2", "phi3", "gpt_neox", "opt"]


def span(rng: np.random.Generator, n_tokens: int, weight: float) -> Weighted:
    return rng.integers(1, 200, n_tokens).tolist(), [weight] * n_tokens


def joined(*parts: Weighted) -> Weighted:
    return [t for ids, _ in parts for t in ids], [w for _, weights in parts for w in weights]


def chats() -> list[Weighted]:
    """Answers with untrained turns between them, in chats that begin alike: an answer is trained
    by some chats and shown by others, and a turn may follow the last answer.
    """
    rng = np.random.default_rng(6)
    system, first_turn = span(rng, 30, 0), span(rng, 7, 0)
    answer = span(rng, 9, 1)
    shown: Weighted = (answer[0], [0] * 9)
    found = [joined(system, first_turn, answer)]
    for n_turn, n_answer in ((3, 5), (8, 1), (1, 40)):
        turn, later = span(rng, n_turn, 0), span(rng, n_answer, 1)
        found.append(joined(system, first_turn, answer, turn, later))
        found.append(joined(system, first_turn, shown, turn, later))
    found.append(joined(system, first_turn, answer, span(rng, 4, 0)))
    found.append(joined(system, span(rng, 2, 0), span(rng, 3, 1), span(rng, 5, 0), span(rng, 2, 1)))
    found += [found[1], joined(span(rng, 1, 0), span(rng, 11, 1))]
    return found


def in_part() -> list[Weighted]:
    """The same chats with answers of every weight, 0 among them."""
    rng = np.random.default_rng(7)
    scales = (0.25, 1, 0.3, 2.5, 1, 0.1, 0, 1, 0.7)
    return [(ids, [w * rng.choice(scales) for w in weights]) for ids, weights in chats()]


def test_the_chats_share_what_is_trained() -> None:
    sequences = TokenSequences.from_weighted(chats())
    tree = build_tree(sequences, np.arange(len(sequences)))
    shared = tree.target_weight[tree.target_weight > 1]
    assert len(tree.token_ids) < len(sequences.tokens) / 3
    assert len(shared) >= 9 and isinstance(tree.n_target_tokens, int)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 2)], ids=["no cut", "cut"])
def test_two_answers_equal_transformers_with_labels(
    make_model: MakeModel, model_type: str, layers: Sequence[int]
) -> None:
    peft_model, data = adapted(make_model, model_type, layers), chats()
    sequences, expected = TokenSequences.from_weighted(data), oracle(peft_model, data)
    trees = [np.arange(4), np.arange(4, len(data))]
    parameters = trainable_parameters(peft_model)
    for step in (PlainStep(peft_model, sequences), TreeStep(peft_model, sequences)):
        found = measure(step, parameters, trees)
        assert isinstance(found.n_tokens, int)
        assert_close(found, expected)


def test_falcon_in_padded_batches(make_model: MakeModel) -> None:
    peft_model, data = adapted(make_model, "falcon"), chats()
    step = make_step(peft_model, TokenSequences.from_weighted(data), TrainSpec(), print)
    assert type(step) is PlainStep
    found = measure(step, trainable_parameters(peft_model), [np.arange(len(data))])
    assert_close(found, oracle(peft_model, data))


def test_the_frozen_prefix_is_read_back(make_model: MakeModel) -> None:
    peft_model, data = adapted(make_model, "llama", (1, 2)), chats()
    step = make_step(peft_model, TokenSequences.from_weighted(data), TrainSpec(), lambda _: None)
    assert isinstance(step, TreeStep) and isinstance(step.prefix_source, PrefixCache)
    expected = oracle(peft_model, data)
    for n_read in (0, 1):
        found = measure(step, trainable_parameters(peft_model), [np.arange(len(data))])
        assert_close(found, expected)
        assert step.prefix_source.n_read_trees == n_read
    step.close()


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("layers", [(0, 1, 2), (2,)], ids=["no cut", "cut"])
def test_fractions_equal_a_weighted_cross_entropy(
    make_model: MakeModel, model_type: str, layers: Sequence[int]
) -> None:
    data = in_part()
    sequences = TokenSequences.from_weighted(data)
    assert sequences.weights.dtype == np.float32
    data = [(ids, [float(np.float32(w)) for w in weights]) for ids, weights in data]
    peft_model = adapted(make_model, model_type, layers).double()
    expected = oracle(peft_model, data, cross_entropy)
    for step in (PlainStep(peft_model, sequences), TreeStep(peft_model, sequences)):
        found = measure(step, trainable_parameters(peft_model), [np.arange(len(data))])
        assert_close(found, expected, 1e-6)  # a tree sums weights in float32


def test_fractions_with_label_smoothing(make_model: MakeModel) -> None:
    peft_model, sequences = adapted(make_model, "llama"), TokenSequences.from_weighted(in_part())
    plain = PlainStep(peft_model, sequences, label_smoothing=0.2)
    tree = TreeStep(peft_model, sequences, label_smoothing=0.2)
    parameters, trees = trainable_parameters(peft_model), [np.arange(len(sequences))]
    assert_close(measure(tree, parameters, trees), measure(plain, parameters, trees))


@pytest.mark.parametrize("model_type", ["llama", "falcon"])
@pytest.mark.parametrize("data", [chats(), in_part()], ids=["whole", "in part"])
def test_losses_by_group(make_model: MakeModel, model_type: str, data: list[Weighted]) -> None:
    peft_model, sequences = adapted(make_model, model_type), TokenSequences.from_weighted(data)
    expected = [oracle(peft_model, [one], cross_entropy) for one in data]
    found = grouped_losses(peft_model, sequences, np.arange(len(data)), Silent())
    for loss, (sum_nats, n_tokens, _) in zip(found, expected, strict=True):
        assert loss.sum_nats == pytest.approx(sum_nats, rel=1e-5)
        assert loss.n_tokens == pytest.approx(n_tokens, rel=1e-6)
    whole = dataset_loss(peft_model, sequences, Silent())
    assert whole.sum_nats == pytest.approx(sum(e.sum_nats for e in expected), rel=1e-5)


def test_the_loop_divides_by_the_sum_of_weights(make_model: MakeModel) -> None:
    data = in_part()
    method: Adapted = adapt(make_model("llama"), AdapterSpec(rank=3), [0, 2], seed=1, n_steps=1)
    fill_b(method.model)
    train_mode(method.model)
    expected = oracle(method.model, data, cross_entropy)
    norm = torch.stack([g.norm() for g in expected.gradients.values()]).norm()
    method.model.zero_grad(set_to_none=True)
    sequences = TokenSequences.from_weighted(data)
    spec = TrainSpec(batch_size=len(data), max_steps=1)
    schedule = Schedule.of(sequences, spec, seed=0)
    (report,) = reports(PlainStep(method.model, sequences), schedule, method)
    assert report["n_tokens"] == pytest.approx(expected.n_tokens, rel=1e-6)
    assert report["loss"] == pytest.approx(expected.sum_nats / expected.n_tokens, rel=1e-5)
    assert report["grad_norm"] == pytest.approx(float(norm) / expected.n_tokens, rel=1e-4)
