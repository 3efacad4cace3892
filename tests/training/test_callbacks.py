"""What callbacks are told of a training, and what they can do to it."""

import pytest
import torch
from tests.support.toy_loop import adapted, fresh_parameters, metrics_of, run_loop, spec, start

from swlora.errors import UserError
from swlora.metrics_file import read_metrics
from swlora.runs import Run, read_run
from swlora.training.callbacks import StepReport, as_callbacks
from swlora.training.checkpoint import LoopState


def test_every_step_is_told_as_it_is_in_the_metrics(tmp_path):
    told: list[StepReport] = []
    run = start(tmp_path / "run")
    run_loop(run, spec(), callbacks=[told.append])
    lines = read_metrics(run.folder)
    assert [dict(report.metrics) for report in told] == lines
    assert [(r.step, r.n_steps) for r in told] == [(n, 6) for n in range(1, 7)]
    names = ["loss", "sum_nats", "n_tokens", "grad_norm", "learning_rate", "rows", "elapsed_s"]
    names.append("examples_per_s")
    for report, line in zip(told, lines, strict=True):
        assert line["examples_per_s"] == pytest.approx(line["rows"] / line["elapsed_s"])
        assert {n: getattr(report, n) for n in names} == {n: line[n] for n in names}
        assert report.held_out_loss is None


def test_a_step_that_was_skipped_has_no_loss() -> None:
    line = {"step": 2, "skipped": 1, "rows": 4, "learning_rate": 0.1, "elapsed_s": 1.0}
    report = StepReport.of(line | {"examples_per_s": 4.0, "eval_nll": 2.5}, 3, print)
    assert report.loss is report.sum_nats is report.grad_norm is None
    assert report.held_out_loss == 2.5


def test_a_callback_changes_nothing_of_the_training(tmp_path):
    """Not even where it draws random numbers, or writes into what it was told."""
    torch.manual_seed(5)
    expected, _ = run_loop(start(tmp_path / "alone"), spec())

    def meddle(report: StepReport) -> bool:
        torch.manual_seed(99)
        report.metrics["loss"] = 0.0  # type: ignore[index]
        return True  # tqdm's update does so as well

    torch.manual_seed(5)
    run = start(tmp_path / "told")
    parameters, _ = run_loop(run, spec(), callbacks=[meddle])
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert len(metrics_of(run)) == 6 and 0.0 not in [row["loss"] for row in metrics_of(run)]


@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_training_that_a_callback_ended_is_saved_and_goes_on(at, tmp_path):
    torch.manual_seed(5)
    whole = start(tmp_path / "whole")
    expected, _ = run_loop(whole, spec())

    def enough(report: StepReport) -> None:
        if report.step == at:
            report.stop()

    torch.manual_seed(5)
    run = start(tmp_path / "run")
    ended, _ = run_loop(run, spec(), callbacks=[enough])
    assert run.facts["status"] == "done" and len(metrics_of(run)) == at
    saved = fresh_parameters()
    state = LoopState(adapted(saved), torch.optim.AdamW(saved.values()))
    assert state.load(run.checkpoint, print) and state.totals.step == at
    assert all(torch.equal(saved[name], ended[name]) for name in saved)
    if at == 6:
        return
    run.facts["status"] = "running"  # the loop alone does not say that steps are left
    run._save()
    again, _ = Run.reopen(run.folder, "train")
    parameters, _ = run_loop(again, spec())
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert metrics_of(again) == metrics_of(whole)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_callback_that_fails_loses_no_step(error, tmp_path):
    torch.manual_seed(5)
    expected, _ = run_loop(start(tmp_path / "whole"), spec())
    told = []

    def fail(report: StepReport) -> None:
        torch.rand(3)
        if report.step == 4:
            raise error

    torch.manual_seed(5)
    run = start(tmp_path / "run")
    with pytest.raises(type(error)) as raised:
        run_loop(run, spec(), callbacks=[fail, told.append])
    assert raised.value is error and len(told) == 3
    status = "failed" if isinstance(error, ValueError) else "cancelled"
    assert read_run(run.folder)["status"] == status and len(metrics_of(run)) == 4
    again, _ = Run.reopen(run.folder, "train")
    parameters, step = run_loop(again, spec())
    assert step.n_calls == 2
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def test_callbacks_are_one_or_several_functions() -> None:
    assert as_callbacks(None) == ()
    assert as_callbacks(print) == as_callbacks([print]) == (print,)
    with pytest.raises(UserError, match="functions of a step's report, not str"):
        as_callbacks("tensorboard")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="functions of a step's report, not int"):
        as_callbacks([print, 3])  # type: ignore[list-item]
