"""The parts of a training's memory are those of what is really there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import adapter_spec
from tests.support.gguf_files import SIZES, write_gguf
from tests.support.models import MakeModel
from tests.training.test_step_memory import ROOM, random_sequences

from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import adapt, train_mode
from swlora.config import TrainSpec
from swlora.evaluation.loss import grouped_losses
from swlora.kernels.linear.packed_weight import held_bytes
from swlora.memory import kept_for_steps
from swlora.models.gguf_frozen import load_gguf_frozen
from swlora.progress import Silent
from swlora.training.fitting import fit_into_memory
from swlora.training.live_bytes import LiveBytes
from swlora.training.memory_parts import (
    Passes,
    adapted_maps,
    copies_bytes,
    memory_parts,
    weights_bytes,
)
from swlora.training.optimizer import make_optimizer
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep
from swlora.training.step_memory import RESIDENT, measured_without_graph


def adapted_model(
    make_model: MakeModel, method: str = "lora", layers: Any = (1, 2), **changes: Any
) -> Adapted:
    model = make_model("llama", **ROOM["llama"] | changes)
    adapted = adapt(model, adapter_spec(method), layers, seed=1, n_steps=60)
    train_mode(adapted.model)
    return adapted


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_once_and_without_the_adapter(
    make_model: MakeModel, tied: bool
) -> None:
    plain = make_model("llama", tie_word_embeddings=tied)
    expected = sum(p.nbytes for p in plain.parameters())  # which counts shared ones once
    head = plain.get_output_embeddings().weight
    assert (head is plain.get_input_embeddings().weight) == tied
    assert weights_bytes(plain) == expected
    adapted = adapt(plain, adapter_spec("lora"), [1, 2], seed=1)
    assert weights_bytes(adapted.model.get_base_model()) == expected


def test_weights_in_a_file_count_as_they_lie_there(
    make_model: MakeModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    quantised_file = tmp_path / "model.gguf"
    model = make_model("llama", **SIZES["llama"])
    write_gguf(model, tiny_tokenizer, quantised_file, kind="Q8_0")
    model, *_ = load_gguf_frozen(quantised_file, torch.float32)
    dense = sum(p.numel() * 4 for p in model.parameters())
    assert 0.2 * dense < weights_bytes(model) < 0.6 * dense
    assert weights_bytes(model) <= quantised_file.stat().st_size


def test_copies_are_those_that_a_step_and_held_out_rows_make(make_model: MakeModel) -> None:
    adapted, sequences = adapted_model(make_model), random_sequences(4, 30)
    step = TreeStep(adapted.model, sequences)
    before = held_bytes()
    with kept_for_steps(0):
        foreseen = copies_bytes(step, 1 << 40)
        assert foreseen > 0
        step([np.arange(4)])
        group = np.zeros(4, dtype=np.int64)
        grouped_losses(adapted.model.eval(), sequences, group, Silent())
        made = held_bytes() - before
    block = sum(p.nbytes for p in step.walk.anatomy.blocks[1].parameters() if not p.requires_grad)
    # What reads the input of the lowest adapted block needs no gradient there.
    assert 0 <= foreseen - made < block
    assert copies_bytes(step, foreseen // 3) <= foreseen // 3
    assert copies_bytes(step, 0) == 0


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "full"])
def test_an_adapter_has_gradients_moments_and_what_its_method_keeps(
    make_model: MakeModel, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swlora.training.memory_parts.peak_memory_bytes", lambda _device: 0)
    adapted, sequences = adapted_model(make_model, method), random_sequences(4, 30)
    step, spec = TreeStep(adapted.model, sequences), TrainSpec(batch_size=4)
    fitted = fit_into_memory(step, Schedule.of(sequences, spec, 0), 1 << 40, str)
    parts = memory_parts(
        step,
        adapted,
        fitted,
        Passes(0, 0),
        held_bytes=10_000_000,
        copies_limit_bytes=0,
        has_checkpoint=True,
        free_bytes=1,
    )
    optimizer = make_optimizer(adapted, spec)
    step([np.arange(4)])
    optimizer.step()
    adapted.after_step(1)
    moments = [t for s in optimizer.state.values() for t in s.values() if t.dim() > 0]
    there = [*adapted.parameters.values(), *(p.grad for p in adapted.parameters.values()), *moments]
    scores = list(adapted.state().values())
    n_bytes = sum(t.nbytes for t in there if t is not None)
    n_scores = sum(t.nbytes for t in scores)
    assert parts.adapter_bytes == n_bytes + 3 * n_scores // 2  # the last ones are in no checkpoint
    trained = sum(p.nbytes for p in adapted.parameters.values())
    assert parts.checkpoint_bytes == 3 * trained + n_scores
    assert (n_scores > 0) == (method == "adalora")
    assert parts.process_bytes == 10_000_000 - parts.weights_bytes - trained
    assert parts.step_bytes == fitted.needed_bytes and parts.step_tokens == 4 * 29
    always = parts.process_bytes + parts.weights_bytes + parts.copies_bytes + parts.adapter_bytes
    assert parts.peak_bytes == always + max(n for _, n in parts.in_turns)


def test_short_rows_tell_of_long_held_out_ones(make_model: MakeModel) -> None:
    adapted = adapted_model(make_model, hidden_size=96, intermediate_size=160)
    sequences = random_sequences(1, 1500)
    memory = measured_without_graph(TreeStep(adapted.model, sequences))
    group = np.zeros(1, dtype=np.int64)
    with LiveBytes() as live:
        grouped_losses(adapted.model.eval(), sequences, group, Silent())
    foreseen = memory.peak_bytes(1499) / RESIDENT
    assert 0.7 * live.peak_bytes < foreseen < 3 * live.peak_bytes


def test_maps_are_counted_by_their_names(make_model: MakeModel) -> None:
    adapted = adapted_model(make_model)
    modules = [
        f"base_model.model.model.layers.{layer}.{name}"
        for layer in (1, 2)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    anatomy = TreeStep(adapted.model, random_sequences(1, 5)).walk.anatomy
    assert adapted_maps(anatomy, modules) == {"self_attn.q_proj": 2, "mlp.down_proj": 2}
