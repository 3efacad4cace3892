"""The memory of steps is foreseen, and steps that would not fit are run in smaller trees."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import CASES, adapter_spec, attach, fill_b
from tests.support.gradients import measure, peak_bytes
from tests.support.models import MakeModel
from tests.training.test_step import adapted

from swlora.adapters.methods import adapt, train_mode, trainable_parameters
from swlora.config import TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.errors import UserError
from swlora.kernels import tree_attention
from swlora.training.fitting import (
    CHEAP_COPIES_BYTES,
    MANY_NODES,
    TOO_MANY_NODES,
    Fitted,
    check_fits,
    copies_worth_bytes,
    fit_into_memory,
    trained_bytes,
)
from swlora.training.live_bytes import LiveBytes
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep
from swlora.training.step_memory import RESIDENT, StepMemory, measured_memory, rough_memory

ROOM = {"llama": {"max_position_embeddings": 2048}, "gpt2": {"n_positions": 2048}}


def random_sequences(n: int, n_tokens: int) -> TokenSequences:
    rng = np.random.default_rng(3)
    ids = rng.integers(1, 200, (n, n_tokens)).tolist()
    return TokenSequences.from_lists([(own[:2], own[2:]) for own in ids])


def test_live_bytes_are_those_of_tensors_that_somebody_holds() -> None:
    there = torch.ones(100, requires_grad=True)
    with LiveBytes() as live:
        first = there.detach() * 2  # 400 bytes
        second = first[:50].view(5, 10)  # a view
        third = first * second.sum()  # 4 bytes, and 400
        del first, second
        assert live.peak_bytes == 804
        fourth = third + 1  # `first` is gone with its view
        third.add_(1)
        del third, fourth
    assert live.peak_bytes == 804
    with LiveBytes() as live:
        loss = (there * there.exp()).sum()  # exp is kept for the gradient
        assert live.peak_bytes == 804
        torch.autograd.backward(loss)
    assert live.peak_bytes >= 804 + 400


@pytest.mark.parametrize("has_fused_paths", [True, False])
@pytest.mark.parametrize("layers", [(0, 1, 2), (2,)])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_short_sequences_tell_of_a_longer_one_and_of_many(
    make_model: MakeModel,
    model_type: str,
    layers: Any,
    has_fused_paths: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The peak that is foreseen is about that of the tensors, for what is much larger."""
    if not has_fused_paths:  # as in bfloat16
        monkeypatch.setattr(tree_attention, "is_fused", lambda *_: False)
    model = make_model(model_type, **ROOM[model_type])
    peft_model = attach(model, adapter_spec("lora"), layers, seed=1)
    train_mode(peft_model)
    for n, n_tokens in ((1, 1200), (30, 60)):
        sequences = random_sequences(n, n_tokens)
        step = TreeStep(peft_model, sequences)
        n_nodes = int((sequences.lengths - 1).sum())
        peak = peak_bytes(step, [np.arange(n)])
        foreseen = measured_memory(step).peak_bytes(n_nodes) / RESIDENT
        assert 0.95 * peak < foreseen
        if n > 1 or not has_fused_paths:  # which take less than other trees of as many nodes
            assert foreseen < 3 * peak


@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_the_rough_formula_is_above_what_is_measured(
    make_model: MakeModel, method: str, model_type: str
) -> None:
    sizes = {"n_embd": 96} if model_type == "gpt2" else {"hidden_size": 96}
    model = make_model(model_type, **ROOM[model_type] | sizes)
    peft_model = adapt(model, adapter_spec(method), [0, 1, 2], seed=1, n_steps=60).model
    train_mode(peft_model)
    sequences = random_sequences(20, 100)
    step = TreeStep(peft_model, sequences)
    n_nodes = int((sequences.lengths - 1).sum())
    rough = rough_memory(step).peak_bytes(n_nodes) / RESIDENT
    peak = peak_bytes(step, [np.arange(20)])
    assert peak < rough < 4 * peak


def test_less_memory_makes_smaller_trees_and_the_same_gradient(make_model: MakeModel) -> None:
    peft_model = adapted(make_model, layers=(0, 1, 2))
    fill_b(peft_model)
    sequences, said = random_sequences(24, 40), list[str]()
    step = TreeStep(peft_model, sequences)
    schedule = Schedule.of(sequences, TrainSpec(batch_size=12), seed=0)
    parameters = trainable_parameters(peft_model)
    assert fit_into_memory(step, schedule, 1 << 40, said.append).needed_bytes > 0
    assert step.most_nodes is None and not said
    own = 3 * sum(p.nbytes for p in parameters.values())
    steps = schedule.epoch(0)
    whole = [measure(step, parameters, groups) for groups in steps]
    peak = RESIDENT * peak_bytes(step, list(steps[0]))
    fitted = fit_into_memory(step, schedule, own + int(peak / 2), said.append)
    assert fitted.needed_bytes <= peak / 2
    assert len(said) == 1 and "tokens at once would take" in said[0]
    assert all(p.grad is None for p in parameters.values())
    for groups, expected in zip(steps, whole, strict=True):
        parts = step.parts(groups)
        assert len(parts) > len(groups) == 1
        assert sorted(np.concatenate(parts)) == sorted(np.concatenate(groups))
        assert RESIDENT * peak_bytes(step, list(groups)) <= peak / 2 + own  # the gradients among it
        found = measure(step, parameters, groups)
        assert found[:2] == pytest.approx(expected[:2], rel=1e-6)
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("constant", [0, 300])
def test_the_largest_tree_that_fits(constant: float) -> None:
    """What is there whatever the tree, such as weights that were gathered, is room for none."""
    memory = StepMemory(constant, 10.5)
    for room in (1000, 1234, 50_000):
        n_nodes = memory.most_nodes(room)
        assert n_nodes > 0
        assert memory.peak_bytes(n_nodes) <= room <= memory.peak_bytes(n_nodes + 1)


def test_a_sequence_that_fits_nowhere_is_said(make_model: MakeModel) -> None:
    peft_model = adapted(make_model)
    sequences, said = random_sequences(3, 200), list[str]()
    step = TreeStep(peft_model, sequences)
    schedule = Schedule.of(sequences, TrainSpec(batch_size=3), seed=0)
    fit_into_memory(step, schedule, 1, said.append)
    assert step.most_nodes == 64
    assert "the longest sequence takes about" in said[-1] and "--truncate" in said[-1]


def test_copies_of_weights_are_few_where_trees_are_large(make_model: MakeModel) -> None:
    """On average: one large tree does not drive them out."""
    few = CHEAP_COPIES_BYTES
    for n, batch_size, expected in ((7, 1, None), (8, 4, few), (7, 4, None), (7, 7, 0)):
        sequences = random_sequences(n, 201)
        step = TreeStep(adapted(make_model), sequences)
        schedule = Schedule.of(sequences, TrainSpec(batch_size=batch_size), seed=0)
        assert copies_worth_bytes(step, schedule) == expected
    assert 7 * 200 / 2 < MANY_NODES <= 4 * 200 * 0.99
    assert 4 * 200 < TOO_MANY_NODES <= 7 * 200 * 0.99


def long_rows(n_tokens: int) -> tuple[TokenSequences, Schedule]:
    sequences = random_sequences(3, n_tokens)
    return sequences, Schedule.of(sequences, TrainSpec(batch_size=3), seed=0)


def fitted_step(
    make_model: MakeModel, n_tokens: int, layers: Any, limit_bytes: int, method: str = "lora"
) -> tuple[TreeStep, Fitted]:
    sizes = {"num_hidden_layers": 8, "hidden_size": 96, "intermediate_size": 400}
    model = make_model("llama", **ROOM["llama"] | sizes)
    peft_model = attach(model, adapter_spec(method), layers, seed=1)
    train_mode(peft_model)
    sequences, schedule = long_rows(n_tokens)
    step = TreeStep(peft_model, sequences)
    return step, fit_into_memory(step, schedule, limit_bytes, str)


def refused(make_model: MakeModel, n_tokens: int, limit_bytes: int, method: str = "lora") -> str:
    step, fitted = fitted_step(make_model, n_tokens, range(8), limit_bytes, method)
    with pytest.raises(UserError) as refusal:
        check_fits(step, fitted, limit_bytes, "--memory-gb allows")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def limit_of(make_model: MakeModel, n_tokens: int, layers: Any, share: float) -> int:
    """Return a share of what a row takes at the least."""
    step, _ = fitted_step(make_model, n_tokens, layers, 1 << 40)
    least = measured_memory(step, n_recomputed=len(layers)).peak_bytes(n_tokens - 1)
    return int(share * least) + 3 * trained_bytes(step)


def test_what_does_not_fit_is_refused_with_rows_that_do(make_model: MakeModel) -> None:
    limit = limit_of(make_model, 1200, range(8), 0.7)
    said = refused(make_model, 1200, limit)
    assert said.startswith("a step over 1,199 tokens, the fewest that can run at once, takes about")
    (n_tokens,) = (int(n.replace(",", "")) for n in re.findall(r"rows of up to ([\d,]+)", said))
    assert 200 < n_tokens < 1200
    step, fitted = fitted_step(make_model, n_tokens, range(8), limit)
    check_fits(step, fitted, limit, "--memory-gb allows")


def test_and_with_layers_that_do(make_model: MakeModel) -> None:
    """Where fewer layers alone make room: their gradients and moments are what is too much."""
    step, _ = fitted_step(make_model, 40, range(8), 1 << 40, "full")
    limit = measured_memory(step).peak_bytes(39) + 3 * trained_bytes(step) // 2
    said = refused(make_model, 40, limit, "full")
    assert "rows of up to" not in said
    (n_last,) = map(int, re.findall(r"--layers last:(\d)", said))
    assert 1 <= n_last < 8
    step, fitted = fitted_step(make_model, 40, range(8 - n_last, 8), limit, "full")
    check_fits(step, fitted, limit, "--memory-gb allows")


def test_what_fits_is_not_refused(make_model: MakeModel) -> None:
    limit = limit_of(make_model, 600, range(8), 1.05)
    step, fitted = fitted_step(make_model, 600, range(8), limit)
    assert fitted.recomputing is not None and fitted.needed_bytes <= limit
    check_fits(step, fitted, limit, "there are")
