"""Held-out losses in the loop: the best is kept, the end comes in time, a kill changes neither."""

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from swlora.adapters.adapted import Adapted
from swlora.config import AdapterSpec, RunSpec, TrainSpec
from swlora.errors import DivergedError, RunFailedError
from swlora.files import replace_folder
from swlora.locks import Lock
from swlora.loss_sum import LossSum
from swlora.metrics_file import read_metrics
from swlora.progress import Silent
from swlora.runs import Run, read_run
from swlora.training.checkpoint import LoopState
from swlora.training.loop import train
from swlora.training.schedule import Schedule
from swlora.training.watch import HeldOutState, Watch

# After steps 2, 4, ..., 16: the best is the third; equal is no better; one better again later.
LOSSES = (3.0, 2.0, 1.5, 1.75, 1.5, 1.625, 1.25, 1.375)
TIMES = ("elapsed_s", "examples_per_s", "nodes_per_s", "tokens_per_s", "busy_share")


class Killed(BaseException):
    """The process is gone."""


def training(
    folder: Path,
    *,
    patience: int | None = None,
    resumed: bool = False,
    at: int = 0,
    every: int = 2,
    removed_at: int = 0,
) -> LoopState:
    """Train 16 steps of one parameter, measure every second; a signal comes in step `at`.

    In step `removed_at` somebody removes the folder.
    """
    weight = nn.Parameter(torch.zeros(3))
    adapted = Adapted(nn.ParameterDict({"w": weight}), AdapterSpec())
    n_called = 0

    def step(_rows: Any) -> LossSum:
        nonlocal n_called
        n_called += 1
        if n_called == at:
            os.kill(os.getpid(), signal.SIGTERM)
        if n_called == removed_at:
            shutil.rmtree(folder)
        loss = (weight - torch.randn(3)).square().sum()
        loss.backward()
        return LossSum(float(loss.detach()), 1)

    def save(target: Path, step: int, loss: float) -> None:
        scratch = target.with_name(".scratch")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        (scratch / "w").write_bytes(weight.detach().numpy().tobytes())
        (scratch / "facts").write_text(f"{step} {loss}")
        replace_folder(scratch, target)

    def measure(n_done: int) -> dict[str, Any]:
        return {"eval_nll": LOSSES[n_done // every - 1]}

    spec = TrainSpec(epochs=4, learning_rate=0.1, checkpoint_every_s=1e-9)
    schedule = Schedule(spec, lambda _: [[np.arange(1)]] * 4, n_steps_per_epoch=4)
    watch = Watch(measure, every, patience, folder / "best", save)
    if resumed:
        run, _ = Run.reopen(folder, "train")
    else:
        run = Run.create(folder, RunSpec(), "train")
    torch.manual_seed(3)
    with run:
        state = train(step, schedule, adapted, run, Silent(), watch)
        (folder / "adapter").mkdir(exist_ok=True)  # which a training saves
    return state


def left_in(folder: Path) -> tuple[bytes, str, list[dict[str, Any]]]:
    """Return what must be the same: the best adapter, what it says, the metrics."""
    rows = read_metrics(folder)
    metrics = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    best = folder / "best"
    assert {path.name for path in best.iterdir()} == {"w", "facts"}
    return (best / "w").read_bytes(), (best / "facts").read_text(), metrics


@pytest.mark.parametrize(
    ("patience", "n_steps", "best_step", "n_since"),
    [(None, 16, 14, 1), (1, 8, 6, 1), (2, 10, 6, 2), (3, 12, 6, 3), (4, 16, 14, 1)],
)
def test_it_ends_after_so_many_measurements_that_were_no_better(
    patience: int | None, n_steps: int, best_step: int, n_since: int, tmp_path: Path
) -> None:
    state = training(tmp_path / "run", patience=patience)
    assert state.totals.step == n_steps
    measured = LOSSES[: n_steps // 2]
    assert state.held_out == HeldOutState(
        n_measured=len(measured),
        first=3.0,
        best=min(measured),
        last=measured[-1],
        best_step=best_step,
        n_since_best=n_since,
    )
    weights, facts, metrics = left_in(tmp_path / "run")
    assert facts == f"{best_step} {min(measured)}"
    assert [(m["step"], m["eval_nll"]) for m in metrics if "eval_nll" in m] == [
        (2 * (k + 1), loss) for k, loss in enumerate(measured)
    ]
    assert len(weights) == 3 * 4


def test_the_best_adapter_is_that_of_its_step(tmp_path: Path) -> None:
    """A training that ends at the best step has its weights."""
    training(tmp_path / "run", patience=2)
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "six", at=6)
    assert left_in(tmp_path / "run")[0] == left_in(tmp_path / "six")[0]
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "four", at=4)
    assert left_in(tmp_path / "run")[0] != left_in(tmp_path / "four")[0]


@pytest.mark.parametrize("at", [1, 2, 5, 6, 7, 9, 10])
def test_stopped_and_resumed_is_never_stopped(at: int, tmp_path: Path) -> None:
    expected = training(tmp_path / "whole", patience=2)
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "run", patience=2, at=at)
    state = training(tmp_path / "run", patience=2, resumed=True)
    assert state.held_out == expected.held_out
    assert state.totals.step == expected.totals.step == 10
    assert left_in(tmp_path / "run") == left_in(tmp_path / "whole")


class KilledAt:
    """Counts what is done to files and folders, and ends the process before number `n`."""

    def __init__(self, patch: pytest.MonkeyPatch, n: int) -> None:
        self.n, self.n_done = n, 0
        for owner, name in ((Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            self.n_done += 1
            if self.n_done >= self.n:  # nothing is done any more, not even on the way out
                raise Killed
            return operation(*arguments, **settings)

        return wrapped


def test_a_kill_between_any_two_operations_on_files_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process that is gone holds no lock; this one would
    monkeypatch.setattr("swlora.work_folder.lock_folder", lambda _: Lock(None))
    expected = training(tmp_path / "whole", patience=2, every=1)
    n, n_resumed = 1, 0
    while True:
        folder = tmp_path / str(n)
        try:
            with monkeypatch.context() as patch:
                KilledAt(patch, n)
                training(folder, patience=2, every=1)
            break
        except Killed:
            pass
        if (folder / "config.yaml").exists():  # else it has not begun
            if read_run(folder)["status"] != "done":
                state = training(folder, patience=2, every=1, resumed=True)
                assert state.held_out == expected.held_out, n
                n_resumed += 1
            assert left_in(folder) == left_in(tmp_path / "whole"), n
            assert not (folder / ".best-previous").exists()
        n += 1
    assert n_resumed > 30


def test_a_best_adapter_that_was_taken_away_is_missed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "run", at=7)
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.raises(RunFailedError, match="best is gone, the adapter of step 6; put it back"):
        training(tmp_path / "run", resumed=True)


@pytest.mark.parametrize("at", [7, 8, 9])
def test_the_best_since_the_folder_was_removed_is_kept(at: int, tmp_path: Path) -> None:
    """The best so far, after step 6, is gone; what is removed and stopped can go on."""
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        training(folder, at=at, removed_at=7)
    assert (folder / "best").is_dir() == (at > 7)
    state = training(folder, resumed=True)
    assert (state.held_out.best, state.held_out.best_step) == (1.25, 14)
    assert (folder / "best" / "facts").read_text() == "14 1.25"
    state = training(tmp_path / "last", removed_at=15)
    assert (state.held_out.n_measured, state.held_out.first) == (8, 3.0)
    assert (state.held_out.best, state.held_out.best_step) == (1.375, 16)
    assert (tmp_path / "last" / "best" / "facts").read_text() == "16 1.375"


def test_a_patience_that_begins_anew_does_so_in_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one alone sees that the folder was removed."""
    first, other = (HeldOutState(2, 3.0, 2.0, 2.5, 2, 1) for _ in range(2))
    first.forget_best()
    assert Watch(lambda _: {}, 2, 1).is_over(first) == Watch(lambda _: {}, 2, 1).is_over(other)
    monkeypatch.setattr("swlora.training.watch.from_main", lambda _make: dict(vars(first)))
    watch = Watch(lambda _: {"eval_nll": 2.25}, 2, 2)
    watch.after_step(other, 4, 8)
    assert (other.n_measured, other.best, other.best_step, other.n_since_best) == (3, 2.25, 4, 0)
    assert not watch.is_over(other)


def test_a_held_out_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    watch = Watch(lambda _: {"eval_nll": math.nan}, 2)
    state = HeldOutState()
    assert watch.after_step(state, 1, 3) == {}
    with pytest.raises(DivergedError, match="held-out rows is not finite after step 2"):
        watch.after_step(state, 2, 3)
    assert state == HeldOutState()


def test_a_watch_that_keeps_nothing_measures_all_the_same() -> None:
    state, watch = HeldOutState(), Watch(lambda step: {"eval_nll": 1 / step}, 3)
    seen = [watch.after_step(state, step, 7) for step in range(1, 8)]
    assert [bool(found) for found in seen] == [False, False, True, False, False, True, True]
    assert (state.first, state.best, state.best_step, state.n_measured) == (1 / 3, 1 / 7, 7, 3)
    assert not watch.is_over(state)
