"""Trackers through Accelerate: what is sent, where runs go on, and what does not end a training."""

import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.support.small_runs import Heard, make_spec, same_weights, signal_in_step, write_data

from swlora import pipeline, trackers
from swlora.config import RunSpec
from swlora.errors import UserError
from swlora.job import Job
from swlora.runs import Run
from swlora.trackers import Trackers, check_trackers, missing_trackers, project_name

pytestmark = pytest.mark.usefixtures("no_drawings")


@pytest.fixture
def no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swlora.evaluation.loss_curve.draw_loss", lambda *_: None)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    return write_data(tmp_path)


@pytest.fixture
def not_accelerated() -> Iterator[None]:
    """No state of Accelerate's, which the logs of its classes want; none is there afterwards."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    assert not PartialState._shared_state


class FakeRun:
    """What wandb.init and mlflow.start_run return; `log` is what was sent, `fails_after` so many
    calls the network is gone.
    """

    def __init__(self, fails_after: int = 1000) -> None:
        self.log_calls: list[tuple[dict[str, Any], int]] = []
        self.fails_after, self.is_finished = fails_after, False
        self.info = SimpleNamespace(run_id="run-of-mlflow")

    def log(self, values: dict[str, Any], step: int) -> None:
        if len(self.log_calls) >= self.fails_after:
            raise ConnectionError("the network\nis gone")
        self.log_calls.append((values, step))

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `wandb` that keeps what Accelerate's class gives it."""
    module: Any = ModuleType("wandb")
    module.runs, module.begun, module.config, module.fails_after = [], [], {}, 1000

    def init(**how: Any) -> FakeRun:
        module.begun.append(how)
        module.runs.append(FakeRun(module.fails_after))
        return module.runs[-1]

    module.init = init
    module.config = SimpleNamespace(update=lambda values, **_: module.__dict__.update(told=values))
    module.__spec__ = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.parametrize("name", ["swlora", "My-Project", "a-1"])
def test_plain_project_names_stay(name):
    assert project_name(name) == name


def test_projects_that_trackio_would_merge_stay_apart():
    names = ["my.model", "my model", "mymodel", "my_model", "мой", "我的", "registry-x", "x" * 99]
    mapped = [project_name(name) for name in names]
    assert len(set(mapped)) == len(names)
    assert mapped[0].startswith("my-model-")
    for name in mapped:
        assert name.replace("-", "").isalnum() and name.isascii() and len(name) < 80
        assert not name.startswith("registry-")
    assert mapped == [project_name(name) for name in names]  # the same every time


def test_what_is_not_installed_is_named_with_how_to(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: None)
    assert missing_trackers(["trackio", "wandb"]) == [
        "--report-to trackio needs a package that is not installed: pip install 'swlora[track]'",
        "--report-to wandb needs a package that is not installed: pip install wandb",
    ]


def test_it_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: None)
    spec = make_spec(tmp_path / "no-model", {"data.name": "no-data"}, train__report_to="mlflow")
    with pytest.raises(UserError, match="pip install mlflow"):
        pipeline.train(Job(spec, Run.prepare(tmp_path / "run", spec, "train"), Heard()))
    assert not (tmp_path / "run").exists()


def test_tensorboard_needs_a_folder(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: True)
    spec = RunSpec.model_validate({"train": {"report_to": "tensorboard"}})
    with pytest.raises(UserError, match="give output"):
        check_trackers(spec.train, has_folder=False)


def test_names_are_checked():
    with pytest.raises(ValueError, match="report_to"):
        RunSpec.model_validate({"train": {"report_to": "tensorbord"}})
    listed = RunSpec.model_validate({"train": {"report_to": "tensorboard,wandb"}})
    assert listed.train.report_to == ["tensorboard", "wandb"]


def started(names: list[str], folder: Path, said: Heard, project: str | None = None) -> Trackers:
    """The trackers of a run in `folder`, begun there before or not."""
    run = Run.create(folder, RunSpec(), "train")
    return Trackers(names, run, project, {"train.epochs": 2, "data.columns": ["a", "b"]}, said.say)


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(
    fake_wandb, not_accelerated, tmp_path
):
    said = Heard()
    fake_wandb.fails_after = 1
    sent = started(["wandb"], tmp_path / "run", said)
    for step in (1, 2, 3):
        sent.report({"step": step, "loss": 1.0})
    sent.close()
    (failure,) = said.lines
    assert failure == "no more reports to wandb: the network is gone; the training goes on"
    assert [step for _, step in fake_wandb.runs[0].log_calls] == [1]


def test_a_tracker_that_asks_for_a_key_does_not_wait(
    fake_wandb, not_accelerated, monkeypatch, tmp_path
):
    def init(**_how: Any) -> FakeRun:
        assert not sys.stdin.isatty(), "this would wait for an answer"
        raise RuntimeError("No API key configured. Use `wandb login`")

    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    fake_wandb.init, said = init, Heard()
    started(["wandb"], tmp_path / "run", said).report({"step": 1, "loss": 1.0})
    (failure,) = said.lines
    assert failure.startswith("no more reports to wandb: No API key configured. Use `wandb login`")
    assert sys.stdin is terminal


def test_what_is_sent(fake_wandb, not_accelerated, tmp_path):
    sent = started(["wandb"], tmp_path / "run", Heard(), "my project")
    report = {"step": 3, "loss": 1.5, "eval_nll": 2.0, "rows": 12, "sum_nats": 9.0}
    sent.report({**report, "grad_norm": float("inf")})
    sent.texts(["a\n\nb"], 3)
    sent.result({"final_loss": 1.25, "method": "lora", "own": {"share": 0.5}, "none": None})
    sent.close()
    (run,) = fake_wandb.runs
    assert run.log_calls == [
        ({"train/loss": 1.5, "eval/loss": 2.0, "train/rows": 12}, 3),
        ({"samples/1": "a\n\nb"}, 3),
        ({"final/final_loss": 1.25, "final/share": 0.5}, 3),
    ]
    assert run.is_finished
    assert fake_wandb.told == {"train.epochs": 2, "data.columns": "a,b"}
    (how,) = fake_wandb.begun
    assert how["project"] == "my project" and how["name"] == f"run-{how['id']}"


def test_a_run_that_goes_on_is_the_same_run(fake_wandb, model_folder, data, tmp_path):
    spec = make_spec(model_folder("llama"), data, train__report_to="wandb")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "append_metrics", signal_in_step(3))
        with Run.create(tmp_path / "run", spec, "train") as run:
            pipeline.train(Job(spec, run, Heard()))
    run, spec = Run.reopen(tmp_path / "run", "train")
    with run:
        pipeline.train(Job(spec, run, Heard()))
    before, after = fake_wandb.begun
    assert before["id"] == after["id"] and after["resume"] == "allow"
    sent = [
        step for one in fake_wandb.runs for values, step in one.log_calls if "train/loss" in values
    ]
    assert sent == list(range(1, 9))
    assert "final/final_loss" in fake_wandb.runs[1].log_calls[-1][0]


def test_a_training_is_the_same_with_and_without(fake_wandb, model_folder, data, tmp_path):
    for name, changes in (("with", {"train__report_to": "wandb"}), ("without", {})):
        spec = make_spec(model_folder("llama"), data, adapter__dropout=0.2, **changes)
        with Run.create(tmp_path / name, spec, "train") as run:
            pipeline.train(Job(spec, run, Heard()))
    assert same_weights(tmp_path / "with" / "adapter", tmp_path / "without" / "adapter")


def test_tensorboard(not_accelerated, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = Heard()
    sent = started(["tensorboard"], tmp_path / "run", said)
    for step in (1, 2, 3):
        sent.report({"step": step, "loss": 1.0 / step})
    sent.texts(["prompt\n\ntext"], 3)
    sent.close()
    run, _ = Run.reopen(tmp_path / "run", "train")
    again = Trackers(["tensorboard"], run, None, {}, said.say)
    for step in (3, 4):  # step 3 is done again
        again.report({"step": step, "loss": 10.0})
    again.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, 10.0), (4, 10.0)]
    assert said.lines == []


def test_tensorboard_keeps_the_last_step_where_the_evaluation_alone_goes_on(
    not_accelerated, tmp_path
):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said, reports = Heard(), [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
    sent = started(["tensorboard"], tmp_path / "run", said)
    for report in reports:
        sent.report(report)
    sent.close()
    run, _ = Run.reopen(tmp_path / "run", "train")
    with run:
        for report in reports:
            run.append_metrics(report)
        again = Trackers(["tensorboard"], run, None, {}, said.say)
        again.result({"final_loss": 0.25})
        again.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("final/final_loss")] == [(2, 0.25)]
    assert said.lines == []


def test_trackio(not_accelerated, monkeypatch, tmp_path, capsys):
    pytest.importorskip("trackio")
    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    said = Heard()
    for project in ("my model", "my.model"):
        sent = started(["trackio"], tmp_path / project / "run", said, project)
        sent.report({"step": 1, "loss": 2.0})
        sent.result({"final_loss": 1.0})
        sent.close()
    assert said.lines == [] and capsys.readouterr().out == ""
    files = sorted((tmp_path / "trackio").glob("*.db"))
    assert [file.stem for file in files] == sorted(map(project_name, ("my model", "my.model")))
    with sqlite3.connect(files[0]) as database:
        rows = database.execute("SELECT step, metrics FROM metrics").fetchall()
        config = database.execute("SELECT config FROM configs").fetchone()[0]
    assert [(step, json.loads(values)) for step, values in rows] == [
        (1, {"train/loss": 2.0}),
        (1, {"final/final_loss": 1.0}),
    ]
    assert json.loads(config)["train.epochs"] == 2
