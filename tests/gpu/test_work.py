"""On a GPU: training that is stopped and goes on, evaluation, and generation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.gpu.test_exactness import WIDE_LLAMA
from tests.gpu.test_exactness import adapted as adapted_model
from tests.support.decoding import EOS
from tests.support.models import MakeModel
from tests.support.sequences import branching

from swlora.adapters.methods import trainable_parameters
from swlora.config import AdapterSpec, RunSpec, TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.decoding.batch import BatchDecoder, DecodeRequest
from swlora.evaluation.loss import dataset_loss
from swlora.kernels import cuda_attention, torch_attention, tree_walk
from swlora.progress import Silent
from swlora.runs import Run
from swlora.training.loop import train
from swlora.training.plain import pad, weighted_loss
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep

pytestmark = pytest.mark.gpu
SPEC = TrainSpec(epochs=2, batch_size=8, learning_rate=5e-3, checkpoint_every_s=1e-9)


class Stopping:
    """A step function that fails as a killed process would, in its call `at`."""

    def __init__(self, step: TreeStep, at: int | None) -> None:
        self._step, self._at, self._n_calls = step, at, 0

    def __call__(self, groups: Any) -> Any:
        self._n_calls += 1
        if self._n_calls == self._at:
            raise MemoryError
        return self._step(groups)

    def ahead(self, steps: Iterator[Any]) -> Iterator[Any]:
        return self._step.ahead(steps)


def trained(make_model: MakeModel, device: str, run: Run, stop_at: int | None = None) -> Any:
    from swlora.adapters.adapted import Adapted

    shape = "llama, grouped heads, own head"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peft_model = adapted_model(make_model, shape, device, dtype)
    sequences = TokenSequences.from_lists(branching())
    step = Stopping(TreeStep(peft_model, sequences), stop_at)
    adapted = Adapted(peft_model, AdapterSpec(rank=3, alpha=7))
    with run:
        train(step, Schedule.of(sequences, SPEC, 0), adapted, run, Silent())
    return {n: p.detach().clone() for n, p in trainable_parameters(peft_model).items()}


def test_a_resumed_training_is_the_whole_one_bit_for_bit(
    make_model: MakeModel, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":  # torch's kernel with a mask adds gradients in any order
        monkeypatch.setattr(tree_walk, "tree_attention", torch_attention.flex)
    spec = RunSpec()
    whole = trained(make_model, device, Run.create(tmp_path / "whole", spec, "train"))
    with pytest.raises(MemoryError):
        trained(make_model, device, Run.create(tmp_path / "stopped", spec, "train"), stop_at=4)
    resumed, _ = Run.reopen(tmp_path / "stopped", "train")
    found = trained(make_model, device, resumed)
    assert all(torch.equal(found[name], expected) for name, expected in whole.items())


def test_an_evaluation_may_come_before_any_training(make_model: MakeModel, device: str) -> None:
    model, sequences = make_model("llama", **WIDE_LLAMA), TokenSequences.from_lists(branching())
    model = model.to(device)
    found = dataset_loss(model, sequences, Silent())
    with torch.no_grad():
        batch = pad(sequences, np.arange(len(sequences)), model.device)
        expected, n_tokens = weighted_loss(model, batch)
    assert found.n_tokens == n_tokens
    assert found.sum_nats == pytest.approx(float(expected), rel=1e-5)
    assert bool(cuda_attention.chosen()) == (device == "cuda")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral"])
def test_greedy_texts_are_those_of_transformers(
    make_model: MakeModel, device: str, model_type: str
) -> None:
    from transformers import GenerationConfig

    model = make_model(model_type).to(device)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 256, n).tolist() for n in (5, 1, 40)]
    batch = BatchDecoder(model, eos_token_ids=[EOS], max_slots=4)
    batch.admit([DecodeRequest(i, prompt, 12) for i, prompt in enumerate(prompts)])
    found: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    while batch.n_requests:
        for event in batch.step():
            if event.finish_reason != "eos":
                found[event.request_id].append(event.token_id)
    setting = {"eos_token_id": EOS, "pad_token_id": EOS, "do_sample": False}
    for i, prompt in enumerate(prompts):
        out = model.generate(
            torch.tensor([prompt], device=device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
            generation_config=GenerationConfig(max_new_tokens=12, **setting),
        )
        assert found[i] == [t for t in out[0, len(prompt) :].tolist() if t != EOS]
