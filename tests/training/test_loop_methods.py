"""The loop with real adapters: each method against a plain loop with PEFT, and its exact resume."""

import math
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tests.support.models import MakeModel

from swlora.adapters.adalora import AdaLora
from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import METHODS, adapt, train_mode
from swlora.config import AdapterSpec, RunSpec, TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.loss_sum import LossSum
from swlora.metrics_file import read_metrics
from swlora.progress import Silent
from swlora.runs import Run
from swlora.training.loop import train
from swlora.training.plain import pad
from swlora.training.schedule import Schedule
from swlora.training.step import TreeStep

LAYERS = [1, 2]
ADALORA_STEPS = 12


def spec(method: str, **changes: Any) -> AdapterSpec:
    sizes: dict[str, Any] = {"rank": 2, "alpha": 4.0}
    sizes = {"full": {}, "supertuning": {"sparsity": 0.9}}.get(method, sizes)
    return AdapterSpec(method=method, **sizes | changes)  # type: ignore[arg-type]


def train_spec(**changes: Any) -> TrainSpec:
    """Twelve steps of 5 rows; gradients are clipped in some of them."""
    settings = {"epochs": 4, "batch_size": 5, "learning_rate": 5e-3, "max_grad_norm": 2.0}
    return TrainSpec.model_validate({**settings, "weight_decay": 0.1} | changes)


def sequences() -> TokenSequences:
    rng = np.random.default_rng(7)
    prompts = [rng.integers(1, 60, 5).tolist() for _ in range(4)]
    return TokenSequences.from_lists(
        [(prompts[i % 4], [*rng.integers(1, 60, 2 + i % 5).tolist(), 0]) for i in range(14)]
    )


class Training:
    """A tiny model, adapted, and the loop around it."""

    def __init__(self, make_model: MakeModel, adapter: AdapterSpec, settings: TrainSpec) -> None:
        self.schedule = Schedule.of(sequences(), settings, seed=3)
        model = make_model("llama", initializer_range=0.05)
        n_steps = self.schedule.n_steps
        self.adapted: Adapted = adapt(model, adapter, LAYERS, seed=1, n_steps=n_steps)
        train_mode(self.adapted.model)

    def run(self, run: Run, *, stop_after: int | None = None) -> None:
        """Train; send SIGTERM while step `stop_after` is under way."""
        step = TreeStep(self.adapted.model, sequences())
        n_calls = 0

        def counted(rows: Any) -> LossSum:
            nonlocal n_calls
            n_calls += 1
            if n_calls == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(rows)

        with run:
            train(counted, self.schedule, self.adapted, run, Silent())

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.adapted.parameters.items()}


def start(folder: Path) -> Run:
    return Run.create(folder, RunSpec(), "train")


# Against plain loops with PEFT


def reference_steps(training: Training, model: Any) -> Any:
    """Yield (step, rate, mean loss as transformers and PEFT make it) of the same rows."""
    for step, rows in enumerate(training.schedule.steps()):
        batch = pad(sequences(), np.concatenate(list(rows)), model.device)
        out = model(
            input_ids=batch.token_ids, attention_mask=batch.attention_mask, labels=batch.labels
        )
        yield step, training.schedule.learning_rate(step), out.loss


def assert_close(found: dict[str, torch.Tensor], model: Any) -> None:
    """Adam divides by a gradient's size, so what is nearly 0 is compared to the largest."""
    for name, value in found.items():
        expected = model.get_parameter(name).detach()
        assert float((value - expected).norm()) < 1e-4 * float(expected.norm()), name


def test_lora_plus_is_pefts_optimizer(make_model: MakeModel, tmp_path: Path) -> None:
    settings = train_spec()
    ours = Training(make_model, spec("lora+", lora_plus_ratio=5.0), settings)
    rates = {name: ours.adapted.rate(name) for name in ours.adapted.parameters}
    assert {(".lora_B." in name, rate) for name, rate in rates.items()} == {
        (False, 1.0),
        (True, 5.0),
    }
    ours.run(start(tmp_path / "run"))

    theirs = Training(make_model, spec("lora"), settings)
    model = theirs.adapted.model
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=5.0, loraplus_weight_decay=0.1
    )
    base_rates = [group["lr"] for group in optimizer.param_groups]
    for _, rate, loss in reference_steps(theirs, model):
        for group, base_rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * base_rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.adapted.parameters.values(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(ours.values(), model)


def test_the_default_ratio_of_lora_plus() -> None:
    module = torch.nn.Linear(2, 2)
    lora_plus = METHODS["lora+"].adapted(module, spec("lora+"))
    assert lora_plus.rate("x.lora_B.default.weight") == 16
    assert lora_plus.rate("x.lora_A.default.weight") == 1


@pytest.fixture(scope="module")
def adalora_reference(make_model: MakeModel) -> tuple[Any, list[float]]:
    """A plain loop as PEFT's documentation has it: (the PeftModel, losses with the regulariser)."""
    settings = train_spec()
    schedule_of = Training(make_model, spec("adalora"), settings)
    initial = schedule_of.values()
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=3,
        target_r=2,
        lora_alpha=4,
        total_step=ADALORA_STEPS,
        tinit=2,
        tfinal=6,
        deltaT=1,
        orth_reg_weight=0.1,
        target_modules=[f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")],
        layers_to_transform=LAYERS,
        layers_pattern="layers",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(make_model("llama", initializer_range=0.05), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for name, value in initial.items():
            model.get_parameter(name).copy_(value)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    losses = []
    for step, rate, loss in reference_steps(schedule_of, model):
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.append(float(loss))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    assert len(losses) == ADALORA_STEPS
    return model, losses


def test_adalora_is_pefts_own_loop(
    make_model: MakeModel, tmp_path: Path, adalora_reference: tuple[Any, list[float]]
) -> None:
    model, losses = adalora_reference
    ours = Training(make_model, spec("adalora"), train_spec())
    ours.run(start(tmp_path / "run"))
    assert_close(ours.values(), model)
    pattern = model.peft_config["default"].rank_pattern
    assert ours.adapted.model.peft_config["default"].rank_pattern == pattern
    assert ours.adapted.ranks == {
        name.removesuffix(".lora_E.default"): sum(mask) for name, mask in pattern.items()
    }
    reported = [row["loss"] for row in read_metrics(tmp_path / "run")]
    added = [theirs - nll for theirs, nll in zip(losses, reported, strict=True)]
    assert all(0.01 < term < 0.2 for term in added)  # the regulariser is not in what is reported
    assert sum(ours.adapted.ranks.values()) < 3 * len(pattern)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_adalora_ends_at_its_budget(make_model: MakeModel, tmp_path: Path, rank: int) -> None:
    ours = Training(make_model, spec("adalora", rank=rank), train_spec())
    matrices = [p for name, p in ours.adapted.parameters.items() if ".lora_E." in name]
    assert {len(p) for p in matrices} == {math.ceil(1.5 * rank)}
    assert ours.adapted.ranks is None
    ours.run(start(tmp_path / "run"))
    assert ours.adapted.ranks is not None
    assert len(ours.adapted.ranks) == len(matrices) == 2 * 7
    assert sum(ours.adapted.ranks.values()) == rank * len(matrices)
    assert sum(int((p != 0).sum()) for p in matrices) == rank * len(matrices)
    assert len(set(ours.adapted.ranks.values())) > 1  # not the same everywhere


def test_the_regulariser_is_pefts(make_model: MakeModel) -> None:
    adapted = Training(make_model, spec("adalora"), train_spec()).adapted
    assert isinstance(adapted, AdaLora)
    batch = pad(sequences(), np.arange(4), "cpu")
    inputs = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask}
    with_term = adapted.model(**inputs, labels=batch.labels).loss
    nll = adapted.model.get_base_model()(**inputs, labels=batch.labels).loss
    torch.testing.assert_close(adapted.penalty(), with_term - nll, rtol=1e-4, atol=0)
    parameters = list(adapted.parameters.values())
    expected = torch.autograd.grad(with_term - nll, parameters, allow_unused=True)
    found = torch.autograd.grad(adapted.penalty(), parameters, allow_unused=True)
    for name, ours, theirs in zip(adapted.parameters, found, expected, strict=True):
        assert (ours is None) == (".lora_E." in name)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


# Stop and resume


@pytest.mark.parametrize("at", [1, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run_that_never_stopped(
    make_model: MakeModel, tmp_path: Path, method: str, at: int
) -> None:
    """Bit for bit. AdaLoRA prunes from step 3, and its last pruning is after step 6."""
    adapter = spec(method) if METHODS[method].first_rank is None else spec(method, dropout=0.2)
    whole = Training(make_model, adapter, train_spec())
    initial = whole.values()
    torch.manual_seed(5)
    whole.run(start(tmp_path / "whole"))
    expected = whole.values()
    assert any(not torch.equal(initial[name], expected[name]) for name in expected)

    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        Training(make_model, adapter, train_spec()).run(start(tmp_path / "cut"), stop_after=at)
    resumed = Training(make_model, adapter, train_spec())
    run, _ = Run.reopen(tmp_path / "cut", "train")
    torch.manual_seed(6)
    resumed.run(run)
    for name, value in resumed.values().items():
        assert torch.equal(value, expected[name]), name
    assert resumed.adapted.ranks == whole.adapted.ranks
    assert [row["loss"] for row in read_metrics(tmp_path / "cut")] == [
        row["loss"] for row in read_metrics(tmp_path / "whole")
    ]
    for stateful in (whole.adapted.state(), resumed.adapted.state()):
        assert bool(stateful) == (method == "adalora")


def test_a_method_without_state_takes_none(make_model: MakeModel) -> None:
    adapted = Training(make_model, spec("lora"), train_spec()).adapted
    adapted.load_state({})
    with pytest.raises(ValueError, match="no state, but was given score/x"):
        adapted.load_state({"score/x": torch.zeros(1)})
