"""The tree step when memory runs out, and which engine a run gets."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import attach, fill_b
from tests.support.gradients import measure
from tests.support.models import MakeModel
from torch import Tensor

from swlora.adapters.methods import train_mode, trainable_parameters
from swlora.config import AdapterSpec, TrainSpec
from swlora.data.prefix_tree import PrefixTree
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError, UserError
from swlora.kernels.tree_layout import TreeLayout
from swlora.training.frozen_prefix import PrefixCache
from swlora.training.plain import PlainStep
from swlora.training.short_training import _held_out_loss
from swlora.training.step import TreeStep, make_step


def adapted(make_model: MakeModel, model_type: str = "llama", layers: Any = (1, 2)) -> Any:
    model = make_model(model_type, initializer_range=0.05)
    spec = AdapterSpec(targets=["all-linear"], rank=2, alpha=4)
    peft_model = attach(model, spec, list(layers), seed=1)
    fill_b(peft_model)
    train_mode(peft_model)
    return peft_model


def make_sequences(n: int = 9) -> TokenSequences:
    rng = np.random.default_rng(7)
    prompt = rng.integers(1, 200, 6).tolist()
    return TokenSequences.from_lists(
        [(prompt[: 3 + i % 4], rng.integers(1, 200, 2 + i % 3).tolist()) for i in range(n)]
    )


class SmallMemory:
    """Serves the frozen prefix of trees of at most `limit` sequences, else is out of memory."""

    def __init__(self, step: TreeStep, limit: int, error: Exception) -> None:
        self.prefix, self.limit, self.error = step.prefix_source, limit, error
        self.n_failed = self.n_served = 0

    def __call__(self, tree: PrefixTree, layout: TreeLayout) -> Tensor:
        if tree.n_sequences > self.limit:
            self.n_failed += 1
            raise self.error
        self.n_served += 1
        return self.prefix(tree, layout)


def assert_same_loss(step: TreeStep | PlainStep, other: TreeStep | PlainStep) -> None:
    """Losses and tokens of a step over all sequences are the same."""
    found, expected = (step([np.arange(9)]) for step in (step, other))
    assert (found.sum_nats, found.n_tokens) == pytest.approx(
        (expected.sum_nats, expected.n_tokens), rel=1e-6
    )


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["accelerator", "cpu"])
@pytest.mark.parametrize(("limit", "halvings"), [(8, 0), (4, 1), (3, 2), (1, 3)])
def test_trees_are_halved_until_they_fit(
    make_model: MakeModel, limit: int, halvings: int, error: Exception
) -> None:
    peft_model, sequences = adapted(make_model), make_sequences(8)
    groups = [np.arange(2), np.arange(8)]
    expected = measure(PlainStep(peft_model, sequences), trainable_parameters(peft_model), groups)
    messages: list[str] = []
    step = TreeStep(peft_model, sequences, say=messages.append)
    memory = SmallMemory(step, limit, error)
    step.prefix_source = memory
    sum_nats, n_tokens, gradients = measure(step, trainable_parameters(peft_model), groups)
    assert (memory.n_failed, len(messages)) == (halvings, halvings)
    assert n_tokens == expected[1]
    assert sum_nats == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[2].items():
        assert float((gradients[name] - gradient).norm() / gradient.norm()) < 1e-5
    if halvings:
        parts = f"cut into {2**halvings} parts from here on"
        assert messages[-1] == f"memory ran out: what runs at once is {parts}"
    # What was learnt is kept: the next step does not fail again.
    measure(step, trainable_parameters(peft_model), groups)
    assert memory.n_failed == halvings


def test_attention_is_tried_on_a_tree_that_fits(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    step = TreeStep(adapted(make_model), make_sequences(8), say=messages.append)
    whole, tried = step.walk.whole, list[int]()

    def with_little_memory(layout: TreeLayout) -> Tensor:
        tried.append(layout.tree.n_sequences)
        if tried[-1] > 4:
            raise OUT_OF_MEMORY[0]
        return whole(layout)

    monkeypatch.setattr(step.walk, "whole", with_little_memory)
    step.try_attention([np.arange(8), np.arange(2)])
    assert (tried, step._n_parts) == ([8, 4], 2)
    assert messages == ["memory ran out: what runs at once is cut into 2 parts from here on"]


def test_the_held_out_loss_of_a_trial_is_halved_too(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TreeStep(adapted(make_model), make_sequences(8), say=lambda _: None)
    steps = [[np.arange(8)], [np.arange(2), np.arange(3, 7)]]
    expected, whole = _held_out_loss(step, steps), step.walk.whole

    def with_little_memory(layout: TreeLayout) -> Tensor:
        if layout.tree.n_sequences > 3:
            raise OUT_OF_MEMORY[1]
        return whole(layout)

    monkeypatch.setattr(step.walk, "whole", with_little_memory)
    assert _held_out_loss(step, steps) == pytest.approx(expected, rel=1e-6)


def test_a_single_sequence_that_does_not_fit_is_an_error(make_model: MakeModel) -> None:
    peft_model = adapted(make_model)
    step = TreeStep(peft_model, make_sequences(5), say=lambda _: None)
    step.prefix_source = SmallMemory(step, 0, OUT_OF_MEMORY[0])
    with pytest.raises(RunFailedError, match="a single sequence does not fit into memory"):
        step([np.arange(5), np.arange(2)])


def test_other_errors_pass_through(make_model: MakeModel) -> None:
    peft_model = adapted(make_model)
    messages: list[str] = []
    step = TreeStep(peft_model, make_sequences(5), say=messages.append)
    step.prefix_source = SmallMemory(step, 1, RuntimeError("mat1 and mat2 shapes"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step([np.arange(5)])
    assert not messages
    assert not [name for name, m in peft_model.named_modules() if "forward" in vars(m)]


def test_the_model_is_as_before_after_a_step(make_model: MakeModel) -> None:
    peft_model, sequences = adapted(make_model), make_sequences()
    with torch.no_grad():
        before = peft_model(torch.tensor([[5, 6, 7]])).logits
    TreeStep(peft_model, sequences)([np.arange(9)])
    assert not [name for name, m in peft_model.named_modules() if "forward" in vars(m)]
    with torch.no_grad():
        assert torch.equal(peft_model(torch.tensor([[5, 6, 7]])).logits, before)
    for name, parameter in peft_model.named_parameters():
        assert (parameter.grad is not None) == ("lora" in name)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("engine", ["auto", "tree"])
def test_trees_wherever_they_work(make_model: MakeModel, model_type: str, engine: Any) -> None:
    spec = TrainSpec(engine=engine, cache_gb=0, label_smoothing=0.2)
    peft_model, sequences = adapted(make_model, model_type), make_sequences()
    step = make_step(peft_model, sequences, spec, print)
    assert type(step) is TreeStep
    assert_same_loss(step, PlainStep(peft_model, sequences, label_smoothing=0.2))


def test_the_plain_engine_on_request(make_model: MakeModel) -> None:
    spec = TrainSpec(engine="plain", label_smoothing=0.2)
    peft_model, sequences = adapted(make_model), make_sequences()
    step = make_step(peft_model, sequences, spec, print)
    assert type(step) is PlainStep
    assert_same_loss(step, TreeStep(peft_model, sequences, label_smoothing=0.2))


def test_falcon_falls_back_to_padded_batches(make_model: MakeModel) -> None:
    peft_model, sequences = adapted(make_model, "falcon"), make_sequences()
    step = make_step(peft_model, sequences, TrainSpec(engine="auto"), print)
    assert type(step) is PlainStep
    sum_nats, n_tokens, gradients = measure(step, trainable_parameters(peft_model), [np.arange(9)])
    assert n_tokens == int((sequences.lengths - sequences.prompt_lengths).sum())
    assert 0 < sum_nats < 10 * n_tokens
    assert all(float(gradient.norm()) > 0 for gradient in gradients.values())


def test_falcon_is_refused_where_trees_are_asked_for(make_model: MakeModel) -> None:
    peft_model = adapted(make_model, "falcon")
    with pytest.raises(UserError, match="falcon models cannot run prefix trees"):
        make_step(peft_model, make_sequences(), TrainSpec(engine="tree"), print)


@pytest.mark.parametrize(("layers", "cache_gb"), [((0, 1, 2), 1.0), ((1, 2), 0.0)])
def test_no_cache_where_there_is_nothing_to_keep_or_no_room(
    make_model: MakeModel, layers: Any, cache_gb: float
) -> None:
    peft_model = adapted(make_model, layers=layers)
    step = make_step(peft_model, make_sequences(), TrainSpec(cache_gb=cache_gb), print)
    assert isinstance(step, TreeStep)
    assert not isinstance(step.prefix_source, PrefixCache)
    cached = make_step(adapted(make_model), make_sequences(), TrainSpec(cache_gb=1.0), print)
    assert isinstance(cached, TreeStep) and isinstance(cached.prefix_source, PrefixCache)
    cached.prefix_source.close()


def test_trees_that_are_made_ahead_are_those_of_the_step(make_model: MakeModel) -> None:
    peft_model, sequences = adapted(make_model), make_sequences()
    step, other = TreeStep(peft_model, sequences), TreeStep(peft_model, sequences)
    step.works_ahead = True
    steps = [[np.arange(4)], [np.arange(2), np.arange(4, 9)], [np.arange(3, 5)]]
    for number, groups in enumerate(step.ahead(iter(steps))):
        assert groups is steps[number]
        assert step._trees_ahead is not None and step._trees_ahead.groups is groups
        if number == 1:  # made for as many parts as there were then
            step._n_parts = 2
        elif number == 2:  # another step than the one that was announced
            groups = [np.arange(9)]
        found, expected = step(groups), other(groups)
        assert found.n_tokens == expected.n_tokens
        assert found.sum_nats == pytest.approx(expected.sum_nats, rel=1e-6)
        assert step._trees_ahead is None
