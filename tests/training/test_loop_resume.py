"""The loop: stopped or killed and resumed, it is the loop that never stopped."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.small_runs import Heard
from tests.support.toy_loop import (
    ToyStep,
    adapted,
    damage,
    fresh_parameters,
    interrupted_at,
    metrics_of,
    run_loop,
    schedule,
    spec,
    start,
)

from swlora.config import RunSpec, load_spec
from swlora.errors import RunFailedError
from swlora.files import write_json
from swlora.metrics_file import read_metrics
from swlora.runs import Run, read_run
from swlora.training.callbacks import StepReport
from swlora.training.checkpoint import LoopState, steps_done
from swlora.training.loop import train
from swlora.training.pace import Pace


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
    assert steps_done(run.checkpoint) == 6  # from which more epochs go on


def test_what_fails_behind_a_step_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    """The weights have changed then, and the random numbers of before do not belong to them."""
    train_spec = spec(checkpoint_every_s=1e-9)
    torch.manual_seed(5)
    whole = start(tmp_path / "whole")
    expected, _ = run_loop(whole, train_spec)
    n_measured, of_step = 0, Pace.of_step

    def fails_in_the_third(pace: Pace, step_s: float) -> dict[str, Any]:
        nonlocal n_measured
        n_measured += 1
        if n_measured == 3:
            raise RunFailedError("cannot write what was measured")
        return of_step(pace, step_s)

    torch.manual_seed(5)
    with monkeypatch.context() as patched, pytest.raises(RunFailedError):
        patched.setattr(Pace, "of_step", fails_in_the_third)
        run_loop(start(tmp_path / "failed"), train_spec)
    run, _ = Run.reopen(tmp_path / "failed", "train")
    assert steps_done(run.checkpoint) == 2
    parameters, _ = run_loop(run, train_spec)
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert metrics_of(run) == metrics_of(whole)


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


def test_a_checkpoint_of_a_cpu_is_read_on_a_gpu(tmp_path, monkeypatch):
    """It holds no state of the GPU's random generator, which keeps its own."""

    def state() -> LoopState:
        parameters = fresh_parameters()
        return LoopState(adapted(parameters), torch.optim.AdamW(parameters.values()))

    heard: list[tuple[torch.Tensor, torch.device]] = []
    saved = state()
    saved.totals.step = 3
    saved.save(tmp_path)
    cuda = torch.device("cuda")
    monkeypatch.setattr(LoopState, "_device", cuda)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: heard.append(given))
    read = state()
    assert read.load(tmp_path, print)
    assert (read.totals.step, heard) == (3, [])
    of_gpu = torch.zeros(16, dtype=torch.uint8)
    read.set_random_state({"rng": torch.get_rng_state(), "rng_cuda": of_gpu})
    assert [(id(given), device) for given, device in heard] == [(id(of_gpu), cuda)]


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
    folder, heard = tmp_path / "run", Heard()
    with pytest.raises(KeyboardInterrupt):
        run_loop(start(folder), spec(), interrupted_at(4, "SIGTERM"))
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(
        b"".join([lines[0], lines[1].replace(b'"step": 2', b'"step": 3')])
    )

    run, _ = Run.reopen(folder, "train")
    parameters = fresh_parameters()
    with run:
        train(ToyStep(parameters), schedule(spec()), adapted(parameters), run, heard)
    assert "metrics.jsonl is damaged: the reports of 3 steps are lost" in heard.lines
    assert [row["step"] for row in read_metrics(folder)] == [1, 5, 6]


def test_reports_are_on_the_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    synced, done = list[str](), list[str]()
    fsync, save = os.fsync, LoopState.save

    def note_sync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_save(state: LoopState, folder: Path, keep: int) -> None:
        done.append(synced[-1])
        save(state, folder, keep)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(LoopState, "save", note_save)
    run_loop(start(tmp_path / "run"), spec(checkpoint_every_s=1e-9))
    assert done == ["metrics.jsonl"] * 6


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


def test_a_damaged_checkpoint_is_not_used(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_loop(start(folder), spec(), interrupted_at(3, "SIGTERM"))
    damage(folder / "checkpoint", 1)
    run, _ = Run.reopen(folder, "train")
    with pytest.raises(RunFailedError, match="is damaged"):
        run_loop(run, spec())


def test_the_checkpoint_before_a_damaged_one_gives_the_same_adapter(tmp_path):
    every_step = spec(save_every="1step", keep_checkpoints=3)
    torch.manual_seed(5)
    expected, _ = run_loop(start(tmp_path / "whole"), every_step)
    torch.manual_seed(5)
    folder = tmp_path / "stopped"
    with pytest.raises(MemoryError):
        run_loop(start(folder), every_step, interrupted_at(5, "crash"))
    names = [f"state-{n}.{end}" for n in (2, 3, 4) for end in ("json", "safetensors")]
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == names
    damage(folder / "checkpoint", 4)
    heard, parameters = Heard(), fresh_parameters()
    step = ToyStep(parameters)
    run, _ = Run.reopen(folder, "train")
    with run:
        train(step, schedule(every_step), adapted(parameters), run, heard)
    assert step.n_calls == 3
    assert any("state-4" in line and "an older one is taken" in line for line in heard.lines)
    assert "resuming after step 3" in heard.lines
    assert heard.done_before["train"] == 3  # which took no time of this process
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_what_the_last_checkpoint_replaces_goes_though_the_removal_was_killed(tmp_path):
    every_step = spec(save_every="1step", keep_checkpoints=1)
    run = start(tmp_path / "run")
    with pytest.raises(MemoryError):
        run_loop(run, every_step, interrupted_at(4, "crash"))
    older = {path.name: path.read_bytes() for path in run.checkpoint.iterdir()}
    reopened, _ = Run.reopen(run.folder, "train")
    run_loop(reopened, every_step)
    names = {path.name for path in run.checkpoint.iterdir()}
    assert not names & older.keys()
    for name, content in older.items():  # as a kill at the end leaves them
        (run.checkpoint / name).write_bytes(content)
    write_json(run.folder / "run.json", read_run(run.folder) | {"status": "failed"})
    again, _ = Run.reopen(run.folder, "train")
    run_loop(again, every_step)
    assert {path.name for path in run.checkpoint.iterdir()} == names


@pytest.mark.parametrize(
    ("every", "saved"), [("2steps", [2, 4, 6]), ("1 step", [1, 2, 3, 4, 5, 6])]
)
def test_checkpoints_are_written_at_the_steps_that_were_asked_for(
    every, saved, tmp_path, monkeypatch
):
    steps, save = list[int](), LoopState.save

    def note_save(state: LoopState, folder: Path, keep: int) -> None:
        assert keep == 2
        steps.append(state.totals.step)
        save(state, folder, keep)

    monkeypatch.setattr(LoopState, "save", note_save)
    run_loop(start(tmp_path / "run"), spec(save_every=every))
    assert steps == saved  # the last one once


# A folder that somebody takes away


@pytest.mark.parametrize("how", ["removed", "emptied", "moved"])
def test_a_folder_that_is_taken_away_is_made_again(how, tmp_path):
    torch.manual_seed(5)
    expected, _ = run_loop(start(tmp_path / "whole"), spec())
    folder = tmp_path / "run"

    def take_away(n_calls: int) -> None:
        if n_calls == 4 and how == "moved":
            folder.rename(tmp_path / "elsewhere")
        elif n_calls == 4:
            for path in folder.iterdir():
                path.unlink()
            if how == "removed":
                folder.rmdir()

    torch.manual_seed(5)
    heard, parameters, run = Heard(), fresh_parameters(), start(folder)
    with run:
        step = ToyStep(parameters, take_away)
        train(step, schedule(spec()), adapted(parameters), run, heard)
        (folder / "adapter").mkdir()
        assert sorted(p.name for p in (folder / "checkpoint").iterdir()) == [
            *("state-1.json", "state-1.safetensors", "state-2.json", "state-2.safetensors")
        ]
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert [line for line in heard.lines if "made again" in line] == [
        f"{folder} was removed while the run was at work: it is made again, and goes on without "
        "the reports and the best adapter so far"
    ]
    assert [row["step"] for row in read_metrics(folder)] == [4, 5, 6]
    facts = read_run(folder)
    assert (facts["status"], facts["folder_made_again"]) == ("done", True)
    assert load_spec(folder / "config.yaml", {}) == RunSpec()


@pytest.mark.parametrize("when", ["before its report", "after its report"])
def test_a_folder_that_is_made_again_has_a_checkpoint_and_what_came_out(when, tmp_path):
    """Whatever was chosen before the first step is not chosen again; nor is a step lost."""
    folder, chosen = tmp_path / "run", {"layer_choice": {"layers": [2]}}

    def take_away(n_calls: int) -> None:
        if n_calls == 4:
            shutil.rmtree(folder)

    def looks_on(report: StepReport) -> None:
        if report.step == 4:
            if when == "after its report":
                shutil.rmtree(folder)
            os.kill(os.getpid(), signal.SIGTERM)

    run = start(folder)
    run.write_result(chosen)
    run.write_result({"data": {"rows": 11}})
    before = take_away if when == "before its report" else None
    with pytest.raises(KeyboardInterrupt):
        run_loop(run, spec(), before, callbacks=[looks_on])
    run, _ = Run.reopen(folder, "train")
    assert run.read_result() == {**chosen, "data": {"rows": 11}}
    assert steps_done(run.checkpoint) == 4


def test_nothing_is_written_into_a_folder_that_took_the_place_of_the_runs(tmp_path):
    folder, old = tmp_path / "run", tmp_path / "old"

    def replace(n_calls: int) -> None:
        if n_calls == 4:
            folder.rename(old)
            folder.mkdir()
            (folder / "run.json").write_text("mine")

    with pytest.raises(RunFailedError, match="was replaced while the run was at work"):
        run_loop(start(folder), spec(save_every="1step"), replace)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("run.json", "mine")]
    run, _ = Run.reopen(old, "train")  # where it was moved to, it can go on
    _, step = run_loop(run, spec())
    assert step.n_calls == 3


def test_a_training_whose_adapter_was_removed_is_not_done(tmp_path):
    run = start(tmp_path / "run")
    with pytest.raises(RunFailedError, match=r"was removed .* and with it the adapter"), run:
        shutil.rmtree(run.folder)
    facts = read_run(run.folder)
    assert facts["status"] == "failed" and "with it the adapter" in facts["reason"]
