"""The loop: its steps against AdamW by itself, its resume against no stop."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from swlora.adapters.adapted import Adapted
from swlora.config import AdapterSpec, RunSpec, TrainSpec
from swlora.errors import DivergedError, RunFailedError
from swlora.loss_sum import LossSum
from swlora.progress import Silent
from swlora.runs import Run, read_metrics
from swlora.snapshots import load_snapshot
from swlora.training.checkpoint import LoopState
from swlora.training.loop import train
from swlora.training.schedule import Schedule, learning_rate

N_ROWS = 11
TIMES = ("elapsed_s", "examples_per_s")
Hook = Callable[[int], None]


def spec(**changes) -> TrainSpec:
    return TrainSpec(**{"epochs": 2, "learning_rate": 0.1, "warmup_fraction": 0.2} | changes)


def plan(epoch: int) -> list[list[np.ndarray]]:
    """Three steps of 4, 4 and 3 rows, in one or two parts, in another order every epoch."""
    order = np.random.default_rng(epoch).permutation(N_ROWS)
    return [[order[:4]], [order[4:6], order[6:8]], [order[8:]]]


def schedule(train_spec: TrainSpec) -> Schedule:
    return Schedule(train_spec, plan, n_steps_per_epoch=3)


def adapted(parameters: dict[str, nn.Parameter]) -> Adapted:
    return Adapted(nn.ParameterDict(parameters), AdapterSpec())


def fresh_parameters(device: str = "cpu") -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a": nn.Parameter(torch.randn(5, 2, generator=generator).to(device)),
        "b": nn.Parameter(torch.randn(2, generator=generator).to(device)),
    }


class ToyStep:
    """A regression with dropout from the global random generator; row i has i + 1 tokens."""

    def __init__(self, parameters: dict[str, nn.Parameter], before: Hook | None = None) -> None:
        self.parameters = parameters
        self.n_calls = 0
        self.before = before
        self.rows_seen: list[list[int]] = []
        self.device = next(iter(parameters.values())).device
        self.x = torch.randn(N_ROWS, 5, generator=torch.Generator().manual_seed(4)).to(self.device)

    def __call__(self, rows) -> LossSum:
        self.n_calls += 1
        if self.before is not None:
            self.before(self.n_calls)
        ids = np.concatenate(rows)
        self.rows_seen.append(ids.tolist())
        kept = torch.nn.functional.dropout(self.x[ids], 0.4)
        n_tokens = torch.from_numpy(ids + 1).to(self.device)
        errors = (kept @ self.parameters["a"] + self.parameters["b"] - 1).square().sum(1)
        loss = (errors * n_tokens).sum()
        loss.backward()
        return LossSum(float(loss.detach()), int(n_tokens.sum()))


def start(folder: Path) -> Run:
    return Run.create(folder, RunSpec(), "train")


def run_loop(run: Run, train_spec: TrainSpec, before: Hook | None = None, device: str = "cpu"):
    parameters = fresh_parameters(device)
    step = ToyStep(parameters, before)
    with run:
        train(step, schedule(train_spec), adapted(parameters), run, Silent())
    return parameters, step


def metrics_of(run: Run) -> list[dict]:
    rows = read_metrics(run.folder)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


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


# Stop and resume


def interrupted_at(step: int, how: str) -> Hook:
    """Stop in step `step`: by a signal, or as a crash would, before the step is done."""

    def before(n_calls: int) -> None:
        if n_calls != step:
            return
        if how == "crash":
            raise MemoryError
        os.kill(os.getpid(), getattr(signal, how))

    return before


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "crash"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_a_resumed_run_is_the_run_that_never_stopped(at, how, tmp_path):
    """Bit for bit: parameters, metrics, the rows that are seen, and the random generator."""
    train_spec = spec(checkpoint_every_s=1e-9, weight_decay=0.1)
    torch.manual_seed(5)
    whole = start(tmp_path / "whole")
    expected, expected_step = run_loop(whole, train_spec)
    expected_rng = torch.get_rng_state()

    torch.manual_seed(5)
    folder = tmp_path / "stopped"
    n_done = at - 1 if how == "crash" else at  # a signal lets the step end
    stopped: type[BaseException] = MemoryError if how == "crash" else KeyboardInterrupt
    with pytest.raises(stopped) as error:
        run_loop(start(folder), train_spec, interrupted_at(at, how))
    status = json.loads((folder / "run.json").read_text())["status"]
    if how != "crash":
        assert str(error.value).startswith(f"stopped after step {at} of 6; --resume --output ")
        assert status == "cancelled"
    assert len(read_metrics(folder)) == n_done

    torch.manual_seed(6 if n_done else 5)  # the checkpoint knows better
    run, _ = Run.reopen(folder, "train")
    parameters, step = run_loop(run, train_spec)
    assert step.rows_seen == expected_step.rows_seen[n_done:]
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert metrics_of(run) == metrics_of(whole)
    assert torch.equal(torch.get_rng_state(), expected_rng)
    assert not run.checkpoint.exists()  # a finished run needs none


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropout_on_a_gpu_goes_on_where_it_stopped(tmp_path):
    torch.manual_seed(5)
    expected, _ = run_loop(start(tmp_path / "whole"), spec(), device="cuda")
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        run_loop(start(tmp_path / "stopped"), spec(), interrupted_at(2, "SIGTERM"), "cuda")
    torch.manual_seed(6)
    run, _ = Run.reopen(tmp_path / "stopped", "train")
    parameters, _ = run_loop(run, spec(), device="cuda")
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def test_stopping_again_and_again(tmp_path):
    train_spec = spec()
    torch.manual_seed(5)
    expected, _ = run_loop(start(tmp_path / "whole"), train_spec)
    torch.manual_seed(5)
    run = start(tmp_path / "stopped")
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            run_loop(run, train_spec, interrupted_at(1, "SIGTERM"))
        run, _ = Run.reopen(tmp_path / "stopped", "train")
    parameters, step = run_loop(run, train_spec)
    assert step.n_calls == 0
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert [row["step"] for row in read_metrics(run.folder)] == [1, 2, 3, 4, 5, 6]


def test_metrics_of_steps_that_a_kill_undid_are_dropped(tmp_path):
    """Checkpoints are rarer than metrics: what came after the last one is done again."""
    torch.manual_seed(5)
    whole = start(tmp_path / "whole")
    expected, _ = run_loop(whole, spec())
    torch.manual_seed(5)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run_loop(start(folder), spec(), interrupted_at(2, "SIGTERM"))
    run, _ = Run.reopen(folder, "train")
    with pytest.raises(MemoryError):
        run_loop(run, spec(), interrupted_at(3, "crash"))  # steps 3 and 4 are not checkpointed
    assert len(read_metrics(folder)) == 4
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a kill in the middle of a write leaves it
    run, _ = Run.reopen(folder, "train")
    parameters, step = run_loop(run, spec())
    assert step.n_calls == 4
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert metrics_of(run) == metrics_of(whole)


def test_reports_that_are_lost_are_said_to_be(tmp_path):
    folder, said = tmp_path / "run", list[str]()
    with pytest.raises(KeyboardInterrupt):
        run_loop(start(folder), spec(), interrupted_at(4, "SIGTERM"))
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(
        b"".join([lines[0], lines[1].replace(b'"step": 2', b'"step": 3')])
    )

    class Heard(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    run, _ = Run.reopen(folder, "train")
    parameters = fresh_parameters()
    with run:
        train(ToyStep(parameters), schedule(spec()), adapted(parameters), run, Heard())
    assert "metrics.jsonl is damaged: the reports of 3 steps are lost" in said
    assert [row["step"] for row in read_metrics(folder)] == [1, 5, 6]


def test_reports_are_on_the_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    synced, done = list[str](), list[str]()
    fsync, save = os.fsync, LoopState.save

    def note_sync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_save(state: LoopState, folder: Path) -> None:
        done.append(synced[-1])
        save(state, folder)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(LoopState, "save", note_save)
    run_loop(start(tmp_path / "run"), spec(checkpoint_every_s=1e-9))
    assert done == ["metrics.jsonl"] * 7


def test_the_second_signal_acts_at_once(tmp_path):
    def twice(n_calls: int) -> None:
        if n_calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second signal was held back")

    run = start(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_loop(run, spec(), twice)
    assert len(read_metrics(run.folder)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_put_back(number, tmp_path):
    before = signal.getsignal(number)
    run_loop(start(tmp_path / "done"), spec())
    assert signal.getsignal(number) == before
    with pytest.raises(MemoryError):
        run_loop(start(tmp_path / "failed"), spec(), interrupted_at(2, "crash"))
    assert signal.getsignal(number) == before


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
    tensors, _ = load_snapshot(run.checkpoint)
    assert torch.equal(tensors["rng"], random_states[0])  # the step's dropout is drawn again
    assert run.facts["status"] == "failed"
    assert [row["step"] for row in read_metrics(run.folder)] == list(range(1, at))
    saved = fresh_parameters()
    state = LoopState(adapted(saved), torch.optim.AdamW(saved.values()))
    assert state.load(run.checkpoint)
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
    assert state.load(run.checkpoint) and state.totals.step == 3
    assert all(bool(torch.isfinite(p).all()) for p in saved.values())


def test_a_step_so_large_that_its_weights_are_useless_is_no_result(tmp_path):
    run = start(tmp_path / "run")
    parameters = fresh_parameters()
    one_step = spec(epochs=1, learning_rate=1e38, max_steps=1, warmup_fraction=0.0)
    with pytest.raises(DivergedError, match="step 1 made weights"), run:
        train(ToyStep(parameters), schedule(one_step), adapted(parameters), run, Silent())
    assert run.facts["status"] == "failed" and not list(run.folder.glob("checkpoint/*"))


def test_a_damaged_checkpoint_is_not_used(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_loop(start(folder), spec(), interrupted_at(3, "SIGTERM"))
    (path,) = (folder / "checkpoint").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    run, _ = Run.reopen(folder, "train")
    with pytest.raises(RunFailedError, match="is damaged"):
        run_loop(run, spec())


def test_a_checkpoint_of_other_parameters_is_not_used(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_loop(start(folder), spec(), interrupted_at(3, "SIGTERM"))
    run, _ = Run.reopen(folder, "train")
    parameters = {"c": nn.Parameter(torch.zeros(2))}
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
    assert state.load(run.checkpoint)
    assert state.totals.step == 2
