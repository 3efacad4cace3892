"""The loop: its steps against AdamW by itself, its resume against no stop."""

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tests.support.toy_loop import (
    ToyStep,
    adapted,
    fresh_parameters,
    interrupted_at,
    metrics_of,
    plan,
    run_loop,
    schedule,
    spec,
    start,
)
from torch import Tensor, nn

from swlora.adapters.adapted import Adapted
from swlora.config import AdapterSpec
from swlora.errors import DivergedError, RunFailedError
from swlora.loss_sum import LossSum
from swlora.metrics_file import read_metrics
from swlora.progress import Silent
from swlora.runs import Run
from swlora.snapshots import load_snapshot
from swlora.training.checkpoint import LoopState
from swlora.training.loop import train
from swlora.training.schedule import Schedule, learning_rate

# A step


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.5])
def test_a_run_is_adamw_on_token_means_clipped(max_grad_norm, tmp_path):
    train_spec = spec(max_grad_norm=max_grad_norm, weight_decay=0.3)
    torch.manual_seed(5)
    run = start(tmp_path / "run")
    parameters, _ = run_loop(run, train_spec)

    torch.manual_seed(5)
    expected = fresh_parameters()
    reference = ToyStep(expected)
    optimizer = torch.optim.AdamW(expected.values(), weight_decay=0.3, fused=False, foreach=False)
    reported = metrics_of(run)
    for step, rows in enumerate([*plan(0), *plan(1)]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train_spec, step, 6)
        loss = reference(rows)
        for p in expected.values():
            p.grad /= loss.n_tokens
        norm = torch.cat([p.grad.flatten() for p in expected.values()]).norm()
        for p in expected.values():
            p.grad *= min(1.0, max_grad_norm / (float(norm) + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        assert reported[step]["loss"] == pytest.approx(loss.nats_per_token, rel=1e-4)
        assert reported[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert reported[step]["learning_rate"] == learning_rate(train_spec, step, 6)
        assert (reported[step]["step"], reported[step]["n_tokens"]) == (step + 1, loss.n_tokens)
    assert [row["rows"] for row in reported] == [4, 8, 11, 15, 19, 22]
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)


def test_twice_the_gradient_of_twice_the_tokens_is_the_same_step(tmp_path):
    results = []
    for factor in (1, 2):
        torch.manual_seed(5)
        parameters = fresh_parameters()
        step = ToyStep(parameters)

        def scaled(rows, step=step, factor=factor) -> LossSum:
            loss = step(rows)
            for p in step.parameters.values():
                p.grad *= factor
            return LossSum(factor * loss.sum_nats, factor * loss.n_tokens)

        train(
            scaled, schedule(spec()), adapted(parameters), start(tmp_path / str(factor)), Silent()
        )
        results.append(parameters)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(("max_steps", "n_expected"), [(1, 1), (4, 4), (6, 6), (99, 6), (None, 6)])
def test_max_steps_ends_the_schedule(max_steps, n_expected, tmp_path):
    run = start(tmp_path / "run")
    _, step = run_loop(run, spec(max_steps=max_steps, schedule="linear"))
    assert step.n_calls == n_expected
    expected = [rows for epoch in (0, 1) for rows in plan(epoch)][:n_expected]
    assert step.rows_seen == [np.concatenate(rows).tolist() for rows in expected]
    rates = [row["learning_rate"] for row in metrics_of(run)]
    assert rates == [learning_rate(spec(), k, n_expected) for k in range(n_expected)]


def test_nothing_to_do_is_an_error(tmp_path):
    with pytest.raises(RunFailedError, match="no step"):
        Schedule(spec(), lambda _: [], n_steps_per_epoch=0)
    with pytest.raises(RunFailedError, match="no parameter"):
        train(ToyStep(fresh_parameters()), schedule(spec()), adapted({}), start(tmp_path), Silent())


# What goes wrong


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 4])
def test_a_number_that_is_not_finite_stops_before_the_weights_change(where, value, at, tmp_path):
    parameters = fresh_parameters()
    step = ToyStep(parameters)
    before: dict[str, torch.Tensor] = {}
    random_states: list[torch.Tensor] = []

    def poisoned(rows) -> LossSum:
        random_state = torch.get_rng_state()
        loss = step(rows)
        if step.n_calls < at:
            return loss
        before.update({name: p.detach().clone() for name, p in parameters.items()})
        random_states.append(random_state)
        if where == "loss":
            return LossSum(value, loss.n_tokens)
        parameters["a"].grad[1, 1] = value
        return loss

    run = start(tmp_path / "run")
    with (
        pytest.raises(RunFailedError, match=f"not finite at step {at}; .*learning-rate") as failed,
        run,
    ):
        train(poisoned, schedule(spec()), adapted(parameters), run, Silent())
    assert len(str(failed.value).splitlines()) == 1
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    snapshot = load_snapshot(run.checkpoint, print)
    assert snapshot and torch.equal(
        snapshot.tensors["rng"], random_states[0]
    )  # the step's dropout is drawn again
    assert run.facts["status"] == "failed"
    assert [row["step"] for row in read_metrics(run.folder)] == list(range(1, at))
    saved = fresh_parameters()
    state = LoopState(adapted(saved), torch.optim.AdamW(saved.values()))
    assert state.load(run.checkpoint, print)
    assert state.totals.step == at - 1
    assert all(torch.equal(saved[name], before[name]) for name in before)


@pytest.mark.parametrize("value", [1e38, 1e22, math.inf, math.nan])
def test_weights_that_cannot_be_used_end_a_training_at_the_checkpoint_before(value, tmp_path):
    parameters = fresh_parameters()
    step = ToyStep(parameters)
    run = start(tmp_path / "run")

    class Spoiled(Adapted):
        def after_step(self, n_done: int) -> None:
            if n_done == 4:
                parameters["a"].data[1, 1] = value

    every_step = spec(checkpoint_every_s=1e-9)
    spoiled = Spoiled(nn.ParameterDict(parameters), AdapterSpec())
    with pytest.raises(DivergedError, match=r"step 4 made weights .*learning-rate") as failed, run:
        train(step, schedule(every_step), spoiled, run, Silent())
    assert sorted(failed.value.sequence_ids) == sorted(np.concatenate(plan(1)[0]))
    assert run.facts["status"] == "failed"
    saved = fresh_parameters()
    state = LoopState(adapted(saved), torch.optim.AdamW(saved.values()))
    assert state.load(run.checkpoint, print) and state.totals.step == 3
    assert all(bool(torch.isfinite(p).all()) for p in saved.values())


def test_a_step_so_large_that_its_weights_are_useless_is_no_result(tmp_path):
    run = start(tmp_path / "run")
    parameters = fresh_parameters()
    one_step = spec(epochs=1, learning_rate=1e38, max_steps=1, warmup_fraction=0.0)
    with pytest.raises(DivergedError, match="step 1 made weights"), run:
        train(ToyStep(parameters), schedule(one_step), adapted(parameters), run, Silent())
    assert run.facts["status"] == "failed" and not list(run.folder.glob("checkpoint/*"))


class OnFullDevice(Tensor):
    """A tensor on a device that has no room for another one."""

    def clone(self, **_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_checkpoint_needs_no_room_on_the_device(tmp_path, monkeypatch):
    parameters = fresh_parameters()
    parameters["a"].data += 1
    state = LoopState(adapted(parameters), torch.optim.AdamW(parameters.values()))
    tensors = LoopState._tensors
    monkeypatch.setattr(
        LoopState,
        "_tensors",
        lambda state: {n: t.as_subclass(OnFullDevice) for n, t in tensors(state).items()},
    )
    state.save(tmp_path)
    monkeypatch.undo()
    saved = fresh_parameters()
    assert LoopState(adapted(saved), torch.optim.AdamW(saved.values())).load(tmp_path, print)
    assert all(torch.equal(saved[name], p) for name, p in parameters.items())


def test_a_checkpoint_of_other_parameters_is_not_used(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_loop(start(folder), spec(), interrupted_at(3, "SIGTERM"))
    run, _ = Run.reopen(folder, "train")
    others = {"c": nn.Parameter(torch.zeros(2))}
    larger = {n: nn.Parameter(torch.zeros(9, *p.shape)) for n, p in fresh_parameters().items()}
    for parameters in (others, larger):
        with pytest.raises(RunFailedError, match="belongs to another adapter"):
            train(ToyStep(parameters), schedule(spec()), adapted(parameters), run, Silent())


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run = start(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_loop(run, spec(), interrupted_at(2, "SIGTERM"))
    before = {p.name: p.read_bytes() for p in run.checkpoint.iterdir()}
    run, _ = Run.reopen(run.folder, "train")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunFailedError) as failed:
        parameters = fresh_parameters()
        patch.setattr(os, "fsync", full)
        train(ToyStep(parameters), schedule(spec()), adapted(parameters), run, Silent())
    assert "No space left on device" in str(failed.value)
    assert len(str(failed.value).splitlines()) == 1
    assert {p.name: p.read_bytes() for p in run.checkpoint.iterdir()} == before
    state = LoopState(adapted(parameters), torch.optim.AdamW(parameters.values()))
    assert state.load(run.checkpoint, print)
    assert state.totals.step == 2


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Nothing of accelerate, which keeps its choices for all of a process, is chosen yet."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.mark.usefixtures("fresh_accelerate")
def test_what_a_trainer_in_the_same_process_has_chosen_changes_nothing(tmp_path):
    torch.manual_seed(5)
    expected, _ = run_loop(start(tmp_path / "alone"), spec())
    Accelerator(mixed_precision="bf16", cpu=True)
    torch.manual_seed(5)
    found, _ = run_loop(start(tmp_path / "beside"), spec())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_accelerator_may_be_made_after_a_training(tmp_path):
    run_loop(start(tmp_path / "run"), spec())
    Accelerator(mixed_precision="bf16", cpu=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_accelerator_that_was_there_goes_on_accumulating(tmp_path):
    mine = Accelerator(cpu=True, gradient_accumulation_steps=4)
    run_loop(start(tmp_path / "run"), spec())
    assert mine.gradient_accumulation_steps == 4
