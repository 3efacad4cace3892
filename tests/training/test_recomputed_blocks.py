"""Blocks that run again in backward change no bit of a step, and keep only their input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import CASES, adapter_spec, fill_b
from tests.support.gradients import Measured, measure, peak_bytes
from tests.support.models import MakeModel

from swlora.adapters.methods import adapt, train_mode, trainable_parameters
from swlora.config import TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.kernels import tree_attention
from swlora.models.anatomy import FAMILIES
from swlora.training.fitting import fit_into_memory
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep
from swlora.training.step_memory import RESIDENT, Recomputing, StepMemory, measured_memory

MODEL_TYPES = [f.model_types[0] for f in FAMILIES if f.has_attention_interface]
SEQUENCES = TokenSequences.from_lists(
    [([1, 2, 3], [k, *range(5, 40)]) for k in (7, 8)] + [([1, 2], [9, 9, 4])]
)


def make_step(
    make_model: MakeModel,
    model_type: str,
    dtype: torch.dtype = torch.float32,
    layers: Sequence[int] = (0, 1, 2),
    method: str = "lora",
    **changes: Any,
) -> TreeStep:
    model = make_model(model_type, initializer_range=0.05).to(dtype)
    peft_model = adapt(model, adapter_spec(method, **changes), layers, seed=1, n_steps=60).model
    fill_b(peft_model)
    train_mode(peft_model)
    return TreeStep(peft_model, SEQUENCES)


def with_recomputed(step: TreeStep, n_blocks: int) -> Measured:
    step.n_recomputed = lambda _nodes: n_blocks
    torch.manual_seed(5)
    return measure(step, trainable_parameters(step.peft_model), [np.arange(3)])


def assert_same_bits(step: TreeStep, numbers: Sequence[int] = (1, 3)) -> None:
    expected = with_recomputed(step, 0)
    generator = torch.get_rng_state()
    assert any(bool(gradient.any()) for gradient in expected.gradients.values())
    for n_blocks in numbers:
        found = with_recomputed(step, n_blocks)
        assert found.sum_nats == expected.sum_nats
        for name, gradient in expected.gradients.items():
            assert torch.equal(found.gradients[name], gradient), (n_blocks, name)
        assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_gradient_has_the_same_bits(
    make_model: MakeModel, model_type: str, dtype: torch.dtype
) -> None:
    assert_same_bits(make_step(make_model, model_type, dtype))


@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_so_it_has_with_every_method(make_model: MakeModel, method: str, model_type: str) -> None:
    assert_same_bits(make_step(make_model, model_type, method=method))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_same_again(
    make_model: MakeModel, method: str, dtype: torch.dtype
) -> None:
    step = make_step(make_model, "llama", dtype, method=method, dropout=0.4)
    assert_same_bits(step)
    torch.manual_seed(6)
    other = measure(step, trainable_parameters(step.peft_model), [np.arange(3)])
    same = with_recomputed(step, 3).gradients
    assert not all(torch.equal(same[name], drawn) for name, drawn in other.gradients.items())


def test_blocks_below_the_lowest_adapted_one_are_not_counted(make_model: MakeModel) -> None:
    assert_same_bits(make_step(make_model, "llama", layers=(1, 2)), (1, 2))


def long_step(make_model: MakeModel, n_sequences: int = 2, n_tokens: int = 900) -> TreeStep:
    """Return a step over sequences that are long, and a short one."""
    sizes = {"max_position_embeddings": 2048, "num_hidden_layers": 6}
    model = make_model("llama", **sizes)
    peft_model = adapt(model, adapter_spec("lora"), range(6), seed=1).model
    fill_b(peft_model)
    train_mode(peft_model)
    ids = np.random.default_rng(3).integers(1, 200, (n_sequences, n_tokens)).tolist()
    sequences = TokenSequences.from_lists([*[(own[:2], own[2:]) for own in ids], ([1], [2, 3])])
    return TreeStep(peft_model, sequences)


def test_less_is_kept_the_more_blocks_run_again(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In chunks, as in bfloat16: what is foreseen is of trees whose attention takes the most
    monkeypatch.setattr(tree_attention, "is_fused", lambda *_: False)
    step, peaks = long_step(make_model), []
    for n_blocks in range(7):
        step.n_recomputed = lambda _nodes, n=n_blocks: n
        peaks.append(peak_bytes(step, [np.array([0])]))
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]
    for n_blocks, peak in enumerate(peaks):  # as much as `Recomputing` counts on, or more
        assert 6 * (peaks[0] - peak) >= n_blocks * (peaks[0] - peaks[6])
    foreseen = measured_memory(step, n_recomputed=6).peak_bytes(899) / RESIDENT
    assert 0.95 * peaks[6] < foreseen < 3 * peaks[6]


def test_a_sequence_that_would_not_fit_runs_blocks_again(make_model: MakeModel) -> None:
    step, said = long_step(make_model), list[str]()
    schedule = Schedule.of(step.sequences, TrainSpec(batch_size=3), seed=0)
    groups, parameters = schedule.epoch(0)[0], trainable_parameters(step.peft_model)
    expected = measure(step, parameters, step.parts(groups))
    alone = measured_memory(step).peak_bytes(899)
    room = int(0.7 * alone)
    own = 3 * sum(p.nbytes for p in parameters.values())
    needed = fit_into_memory(step, schedule, room + own, said.append).needed_bytes
    assert needed <= room
    assert len(said) == 2  # fewer sequences at once, then blocks
    assert "at most" in said[0] and "are run at once, with the same gradient" in said[0]
    n_blocks = step.n_recomputed(899)
    assert 0 < n_blocks < 6
    assert f"{n_blocks} of 6 blocks keep only their input and run again in backward" in said[1]
    assert step.n_recomputed(100) == 0  # only trees that need it
    assert RESIDENT * peak_bytes(step, list(groups)) <= needed + own
    found = measure(step, parameters, groups)
    assert found.sum_nats == pytest.approx(expected.sum_nats, rel=1e-6)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_run_that_goes_on_keeps_its_trees_where_blocks_can_run_again(
    make_model: MakeModel,
) -> None:
    step, said = long_step(make_model, n_sequences=3, n_tokens=300), list[str]()
    schedule = Schedule.of(step.sequences, TrainSpec(batch_size=4), seed=0)
    groups, parameters = schedule.epoch(0)[0], trainable_parameters(step.peft_model)
    own = 3 * sum(p.nbytes for p in parameters.values())
    expected = measure(step, parameters, groups)
    room = int(0.8 * measured_memory(step).peak_bytes(900))
    fit_into_memory(step, schedule, room + own, said.append, keeps_trees=True)
    assert len(said) == 1 and "run again in backward" in said[0]
    assert step.most_nodes is None
    found = measure(step, parameters, groups)
    assert found.sum_nats == expected.sum_nats
    assert all(torch.equal(found.gradients[n], g) for n, g in expected.gradients.items())
    fit_into_memory(step, schedule, own + 1, said.append, keeps_trees=True)
    assert step.most_nodes == 64  # what it cannot keep


def test_as_many_blocks_as_it_takes() -> None:
    kept, recomputed = StepMemory(0, 100 / RESIDENT), StepMemory(0, 20 / RESIDENT)
    recomputing = Recomputing(8, kept, recomputed, room_bytes=1000)
    assert [recomputing(n) for n in (10, 11, 12, 15, 40, 100)] == [0, 1, 2, 4, 8, 8]
    assert [recomputing.peak_bytes(n) for n in (10, 11, 12, 15)] == [1000, 990, 960, 900]
    assert recomputing.peak_bytes(100) == 2000  # more than there is: all that can be done
