"""Steps whose loss or gradient is not finite: passed over where that is asked for, and counted."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support.small_runs import Heard
from torch import nn

from swlora.adapters.adapted import Adapted
from swlora.config import AdapterSpec, RunSpec, TrainSpec
from swlora.errors import DivergedError
from swlora.evaluation.loss_curve import course_of
from swlora.loss_sum import LossSum
from swlora.metrics_file import read_metrics
from swlora.runs import Run
from swlora.training import loop
from swlora.training.loop import train
from swlora.training.schedule import Schedule, learning_rate

N_STEPS = 8


@pytest.fixture(params=["host", "device"], autouse=True)
def decided_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who decides whether the weights change: as on a CPU, and as on a GPU."""
    monkeypatch.setattr(loop, "decides_on_device", lambda _adapted: request.param == "device")


def spec(on_nonfinite: str) -> TrainSpec:
    return TrainSpec(learning_rate=0.1, weight_decay=0.2, on_nonfinite=on_nonfinite)


def schedule(train_spec: TrainSpec) -> Schedule:
    return Schedule(train_spec, lambda _epoch: [[np.array([i])] for i in range(N_STEPS)], N_STEPS)


class Step:
    """A regression of a row a step; `bad` says what is no number in which step (1-based)."""

    def __init__(self, weight: nn.Parameter, bad: dict[int, str], stop_in: int = 0) -> None:
        self.weight, self.bad, self.stop_in = weight, bad, stop_in
        self.x = torch.randn(N_STEPS, 3, generator=torch.Generator().manual_seed(4))

    def __call__(self, groups) -> LossSum:
        row = int(groups[0][0])
        kept = torch.nn.functional.dropout(self.x[row], 0.4)
        loss = (kept @ self.weight - 1).square()
        loss.backward()
        what = self.bad.get(row + 1)
        if what == "gradient":
            self.weight.grad[1] = torch.inf
        if row + 1 == self.stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return LossSum(float("nan") if what == "loss" else float(loss.detach()), 2)


def run_loop(folder: Path, on_nonfinite: str, bad: dict[int, str], *, run=None, stop_in: int = 0):
    torch.manual_seed(5)
    weight, heard = nn.Parameter(torch.ones(3)), Heard()
    adapted = Adapted(nn.ParameterDict({"w": weight}), AdapterSpec())
    with run or Run.create(folder, RunSpec(), "train") as entered:
        state = train(
            Step(weight, bad, stop_in),
            schedule(spec(on_nonfinite)),
            adapted,
            entered,
            heard,
            rows_of=lambda step: f"line {int(step[0][0]) + 1}",
        )
    return weight, state, heard.lines


def test_a_skipped_step_leaves_weights_and_optimizer_alone(tmp_path):
    bad = {3: "loss", 6: "gradient"}
    weight, state, said = run_loop(tmp_path / "run", "skip:2", bad)
    torch.manual_seed(5)
    expected = nn.Parameter(torch.ones(3))
    optimizer, step = torch.optim.AdamW([expected], weight_decay=0.2), Step(expected, {})
    for row in range(N_STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(spec("stop"), row, N_STEPS)
        step([np.array([row])])
        expected.grad /= 2
        nn.utils.clip_grad_norm_([expected], 1.0)
        if row + 1 not in bad:
            optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    lines = read_metrics(tmp_path / "run")
    assert [line.get("skipped") for line in lines] == [None, None, 1, None, None, 2, None, None]
    assert [line["step"] for line in lines if "loss" not in line] == [3, 6]
    assert [line["rows"] for line in lines] == list(range(1, 9))
    assert said[0] == (
        "step 3 is skipped, 1 of 2 at most: its loss or gradient is not finite (rows of that step: "
        "line 3)"
    )
    course = course_of(state, schedule(spec("skip:2")), lines)
    assert course.skipped_steps == 2 and course.last_loss == lines[-1]["loss"]


def test_one_more_than_that_ends_the_training(tmp_path):
    bad = {2: "loss", 5: "loss", 7: "gradient"}
    expected = r"at step 7, after 2 that were skipped; .*a larger N in --on-nonfinite skip:N$"
    with pytest.raises(DivergedError, match=expected):
        run_loop(tmp_path / "run", "skip:2", bad)
    assert len(read_metrics(tmp_path / "run")) == 6
    with pytest.raises(DivergedError, match=r"at step 2; .* or --on-nonfinite skip:N$"):
        run_loop(tmp_path / "stop", "stop", bad)


def test_a_run_that_goes_on_keeps_the_count(tmp_path):
    bad = {2: "loss", 5: "gradient", 7: "loss"}
    whole, _, _ = run_loop(tmp_path / "whole", "skip:3", bad)
    with pytest.raises(KeyboardInterrupt):
        run_loop(tmp_path / "stopped", "skip:3", bad, stop_in=5)
    run, _ = Run.reopen(tmp_path / "stopped", "train")
    weight, state, _ = run_loop(tmp_path / "stopped", "skip:3", bad, run=run)
    assert torch.equal(weight, whole) and state.totals.skipped == 3
    with pytest.raises(KeyboardInterrupt):
        run_loop(tmp_path / "few", "skip:2", bad, stop_in=5)
    run, _ = Run.reopen(tmp_path / "few", "train")
    with pytest.raises(DivergedError, match="at step 7, after 2 that were skipped"):
        run_loop(tmp_path / "few", "skip:2", bad, run=run)


def test_a_training_of_skipped_steps_alone_is_none(tmp_path):
    bad = dict.fromkeys(range(1, N_STEPS + 1), "loss")
    with pytest.raises(DivergedError, match="no step of the training had a finite loss"):
        run_loop(tmp_path / "run", "skip:100", bad)


@pytest.mark.parametrize("value", ["skip", "skip:0", "skip:-1", "go", "skip:1x", ""])
def test_other_words_are_refused(value):
    with pytest.raises(ValidationError):
        TrainSpec(on_nonfinite=value)
