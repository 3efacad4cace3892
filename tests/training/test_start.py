"""A training that starts from an adapter, against PEFT that loads it and trains on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.support.adapters import adapter_spec, randomise
from tests.support.models import MakeModel

from swlora.adapters.methods import adapt, train_mode
from swlora.adapters.saved import save_adapter
from swlora.adapters.start import settled_start, start_from
from swlora.config import AdapterSpec, TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.models.anatomy import Anatomy
from swlora.progress import Silent
from swlora.run_record import MemoryRecord
from swlora.training.loop import train
from swlora.training.plain import pad
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep

SETTINGS = TrainSpec(
    epochs=2, batch_size=5, learning_rate=5e-3, max_grad_norm=2.0, weight_decay=0.1
)


def sequences() -> TokenSequences:
    rng = np.random.default_rng(7)
    prompts = [rng.integers(1, 60, 5).tolist() for _ in range(4)]
    return TokenSequences.from_lists(
        [(prompts[i % 4], [*rng.integers(1, 60, 2 + i % 5).tolist(), 0]) for i in range(14)]
    )


def ours(model: Any, folder: Path, **given: Any) -> Any:
    spec = settled_start(AdapterSpec(start=folder, **given), Anatomy(model))
    adapted = start_from(model, spec, seed=1)
    train_mode(adapted.model)
    schedule = Schedule.of(sequences(), SETTINGS, seed=3)
    train(TreeStep(adapted.model, sequences()), schedule, adapted, MemoryRecord(), Silent())
    return adapted.model


def theirs(model: Any, folder: Path) -> Any:
    peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=SETTINGS.weight_decay)
    schedule = Schedule.of(sequences(), SETTINGS, seed=3)
    for step, rows in enumerate(schedule.steps()):
        batch = pad(sequences(), np.concatenate(list(rows)), peft_model.device)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        peft_model(
            input_ids=batch.token_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return peft_model


def assert_same(found: Any, expected: Any, start: Any) -> None:
    """Compare what was trained; Adam divides by a gradient's size, so norms are compared."""
    by_name, n_moved = {n: p.detach() for n, p in expected.named_parameters()}, 0
    before = dict(start.named_parameters())
    for name, value in found.named_parameters():
        if value.requires_grad:
            other = by_name[name]
            n_moved += not torch.equal(before[name], other)
            assert float((value.detach() - other).norm()) < 1e-4 * float(other.norm()), name
    assert n_moved == sum(p.requires_grad for p in expected.parameters()) > 0


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "full", "supertuning"])
def test_it_is_peft_that_loads_the_adapter_and_trains_on(
    method: str, make_model: MakeModel, tmp_path: Path
) -> None:
    first = adapt(make_model("llama"), adapter_spec(method), [0, 2], seed=1)
    if method == "full":
        for parameter in first.parameters.values():
            parameter.data.mul_(1.01)
    else:
        randomise(first.model, 0.03)
    first.finish()
    save_adapter(first.model, tmp_path / "first", {})
    start = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "first"))
    expected = theirs(make_model("llama"), tmp_path / "first")
    assert_same(ours(make_model("llama"), tmp_path / "first"), expected, start)


def test_an_adapter_of_peft_with_ranks_of_its_own(make_model: MakeModel, tmp_path: Path) -> None:
    """Different ranks and scales, and projections that differ from layer to layer."""
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=r"model\.layers\.(0\.self_attn\.q_proj|2\.mlp\.(up|down)_proj)",
        rank_pattern={r"layers\.2\.mlp\.up_proj": 2},
        alpha_pattern={"q_proj": 9},
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(make_model("llama"), config)
    randomise(peft_model, 0.03)
    peft_model.save_pretrained(str(tmp_path / "first"))
    start = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "first"))
    expected = theirs(make_model("llama"), tmp_path / "first")
    assert_same(ours(make_model("llama"), tmp_path / "first"), expected, start)
    settled = settled_start(AdapterSpec(start=tmp_path / "first"), Anatomy(make_model("llama")))
    assert (settled.method, settled.rank, settled.alpha) == ("lora", 3, 5.0)
    assert str(settled.layers) == "0,2"
    assert settled.targets == ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]
