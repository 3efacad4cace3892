"""Held-out losses through the pipeline: shown, the best adapter kept, the end in time."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from tests.support import small_runs
from tests.support.data_files import write_rows
from tests.support.models import ModelFolder
from tests.support.small_runs import Heard, same_weights, signal_in_step

from swlora import pipeline
from swlora.adapters.methods import METHODS
from swlora.adapters.saved import adapter_folder, read_facts
from swlora.cli.show import show_training
from swlora.config import RunSpec, load_spec
from swlora.evaluation.held_out import Measurements, planned_measurements
from swlora.evaluation.loss import dataset_loss
from swlora.job import Job
from swlora.metrics_file import read_metrics
from swlora.models.load import load_model
from swlora.preparation import encode_held_out
from swlora.progress import Silent
from swlora.result_json import as_json
from swlora.run_record import MemoryRecord
from swlora.runs import Run
from swlora.training.trained import Trained
from swlora.web.folders import RunFolders

pytestmark = pytest.mark.usefixtures("no_drawings")


def make_spec(model: Path, data: dict[str, str], **changes: Any) -> RunSpec:
    """Four epochs of four steps, at a rate that soon makes held-out rows worse."""
    long = {"train__epochs": 4, "train__learning_rate": 0.1}
    return small_runs.make_spec(model, data, **long | changes)


def train_in(folder: Path, spec: RunSpec, progress: Any = None) -> Trained:
    with Run.create(folder, spec, "train") as run:
        return pipeline.train(Job(spec, run, progress or Silent()))


@pytest.mark.parametrize("method", METHODS)
def test_the_best_adapter_is_the_one_that_was_measured(
    method: str, model_folder: ModelFolder, data: dict[str, str], tmp_path: Path
) -> None:
    """In plain PEFT; and the training goes on as if nothing had been saved."""
    spec = make_spec(
        model_folder("llama"), data, method=method, train__eval_every_steps=1, train__max_steps=9
    )
    result = train_in(tmp_path / "run", spec)
    best, held_out = result.best_adapter, result.course.held_out
    assert best is not None and held_out is not None
    assert best == tmp_path / "run" / "best" == adapter_folder(best)
    measured = {row["step"]: row["eval_nll"] for row in read_metrics(tmp_path / "run")}
    assert held_out.best == min(measured.values()) == measured[held_out.best_step]
    assert (held_out.first, held_out.last) == (measured[1], measured[9])
    step = held_out.best_step
    assert read_facts(best) == read_facts(tmp_path / "run" / "adapter") | {
        "step": step,
        "losses_nats_per_token": {f"held-out rows, after step {step}": held_out.best},
    }
    assert read_facts(best)["training"]["batch_size"] == 3

    loaded = load_model(spec.model)
    with Run.create(tmp_path / "read", spec, "train") as run:
        dev = Job(spec, run, Silent()).encoded("dev").sequences
    plain = PeftModel.from_pretrained(loaded.model, str(best)).eval()
    loss = dataset_loss(plain, dev, Silent()).nats_per_token
    assert loss == pytest.approx(held_out.best, rel=1e-5)

    unmeasured = make_spec(
        model_folder("llama"), data, method=method, train__eval_every_steps=0, train__max_steps=9
    )
    train_in(tmp_path / "unmeasured", unmeasured)
    assert same_weights(tmp_path / "run" / "adapter", tmp_path / "unmeasured" / "adapter")
    assert not (tmp_path / "unmeasured" / "best").exists()


@pytest.mark.parametrize("method", ["lora", "pissa", "adalora", "full"])
def test_stopped_early_resumed_or_not(
    method: str,
    model_folder: ModelFolder,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Held-out rows of other letters: what is learnt makes them worse."""
    other = json.dumps({"prompt": "name[E], food[x]\n", "completion": "~@~@#~"})
    Path(data["data.eval_file"]).write_text(other + "\n")
    spec = make_spec(model_folder("llama"), data, method=method, train__early_stopping=2)
    expected = train_in(tmp_path / "whole", spec)
    held_out, n_steps = expected.course.held_out, expected.course.steps
    assert held_out is not None
    assert n_steps == held_out.best_step + 2 < expected.course.planned_steps == 16
    assert held_out.n_since_best == 2
    assert not same_weights(tmp_path / "whole" / "adapter", tmp_path / "whole" / "best")

    for stop in {1, held_out.best_step, n_steps}:
        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "append_metrics", signal_in_step(stop))
            train_in(folder, spec)
        run, resumed = Run.reopen(folder, "train")
        with run:
            result = pipeline.train(Job(resumed, run, Silent()))
        assert result.course.held_out == held_out
        assert (result.course.steps, result.course.final_loss) == (
            n_steps,
            expected.course.final_loss,
        )
        for name in ("adapter", "best"):
            assert same_weights(folder / name, tmp_path / "whole" / name)

    show_training(expected)
    said = capsys.readouterr().out
    assert f"{held_out.best:.3f} best (step {held_out.best_step})" in said
    assert f"stopped early, after {n_steps} of 16 steps: no better held-out loss in 2" in said
    assert f"best adapter: {tmp_path / 'whole' / 'best'}" in said


def test_the_server_finds_both(
    model_folder: ModelFolder, data: dict[str, str], tmp_path: Path
) -> None:
    spec = make_spec(model_folder("llama"), data, train__eval_every_steps=8)
    train_in(tmp_path / "runs" / "mine", spec)
    adapters = RunFolders(tmp_path / "runs").adapters()
    assert set(adapters) == {"mine", "mine/best"}
    assert adapters["mine/best"].folder == tmp_path / "runs" / "mine" / "best"


# Where nothing is asked for


def test_held_out_loss_is_shown_by_itself(
    model_folder: ModelFolder,
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    heard = Heard()
    spec = make_spec(model_folder("llama"), data, train__learning_rate=0.01)
    result = train_in(tmp_path / "run", spec, heard)
    measured = [row["step"] for row in read_metrics(tmp_path / "run") if "eval_nll" in row]
    assert measured == [4, 8, 12, 16]
    last = read_metrics(tmp_path / "run")[-1]
    best = f"{result.course.held_out.best:.3f}"
    assert f"held-out {last['eval_nll']:.3f} (best {best})  " in heard.notes[-1]
    assert "held-out" not in heard.notes[2]
    assert "best_adapter" not in as_json(result)
    assert not (tmp_path / "run" / "best").exists()
    show_training(result)
    lines = capsys.readouterr().out.splitlines()
    loss = f"loss: {result.course.final_loss:.3f} (mean of the last 2 of 16 steps)"
    measured = lines[lines.index(loss) + 1]
    assert measured.startswith(f"held-out loss: {result.course.held_out.first:.3f} first, ")


def test_data_without_held_out_rows_train_all_the_same(
    model_folder: ModelFolder, data: dict[str, str], tmp_path: Path
) -> None:
    heard = Heard()
    changes = {"data__eval_file": None, "data__eval_split": "test", "train__max_steps": 2}
    spec = make_spec(model_folder("llama"), data, **changes)
    assert "held_out" not in as_json(train_in(tmp_path / "run", spec, heard))
    assert "the data set has no test split, so no held-out loss is measured" in heard.lines


@pytest.mark.parametrize(
    ("data_of", "changes", "expected"),
    [
        (
            *("file", {"data__eval_split": "test", "train__early_stopping": 2}),
            "the rows of --eval-file say when to stop and which adapter is best, so that scores on "
            "them will flatter; evaluate on other rows",
        ),
        (
            *("file", {"train__eval_every_steps": 4}),
            "the rows of --eval-file say which adapter is best, so that its scores on them will "
            "flatter; evaluate on other rows",
        ),
        (
            *("splits", {"data__eval_split": "test", "train__eval_every_steps": 4}),
            "the test rows say which adapter is best, so that its scores on them will flatter; "
            "--split dev leaves them unseen",
        ),
        (
            *("splits", {"data__eval_split": "test", "train__early_stopping": 2}),
            "the test rows say when to stop and which adapter is best, so that scores on them will "
            "flatter; --split dev leaves them unseen",
        ),
        ("splits", {"train__early_stopping": 2}, None),
        ("splits", {"data__eval_split": "test"}, None),
        ("file", {}, None),
    ],
)
def test_what_the_test_rows_choose_is_said(
    model_folder: ModelFolder,
    data: dict[str, str],
    tmp_path: Path,
    data_of: str,
    changes: dict[str, Any],
    expected: str | None,
) -> None:
    """Where nothing is chosen by them, nothing is said; --eval-file is dev and test at once."""
    if data_of == "splits":
        for name in ("train", "dev", "test"):
            write_rows(tmp_path / "rows" / f"{name}.jsonl", small_runs.ROWS)
        data = {"data.name": str(tmp_path / "rows")}
    heard, spec = Heard(), make_spec(model_folder("llama"), data, **changes)
    planned = planned_measurements(spec.train, n_steps=16, n_sequences=48)
    with Run.create(tmp_path / "run", spec, "train") as run:
        assert encode_held_out(Job(spec, run, heard), planned) is not None
    assert [line for line in heard.lines if "flatter" in line] == ([expected] if expected else [])


def test_without_a_run_folder_no_adapter_is_chosen(
    model_folder: ModelFolder, data: dict[str, str]
) -> None:
    for changes, n_said in (({"train__eval_every_steps": 4}, 0), ({"train__early_stopping": 2}, 1)):
        heard, spec = Heard(), make_spec(model_folder("llama"), data, **changes)
        planned = planned_measurements(spec.train, n_steps=16, n_sequences=48)
        encode_held_out(Job(spec, MemoryRecord(), heard), planned)
        said = [line for line in heard.lines if "flatter" in line]
        assert len(said) == n_said and not any("which adapter" in line for line in said)


def test_few_rows_get_small_steps_and_are_told(
    model_folder: ModelFolder, data: dict[str, str], tmp_path: Path
) -> None:
    heard = Heard()
    spec = make_spec(model_folder("llama"), data, train__batch_size=None, train__epochs=None)
    result = train_in(tmp_path / "run", spec, heard)
    course = result.course
    assert (course.epochs, course.batch_size, course.steps) == (3, 1, 36)
    said = "few data (12 rows): 3 epochs, 1 row a step, 36 steps in all (--epochs and --batch-size"
    assert any(line.startswith(said) for line in heard.lines)
    assert load_spec(tmp_path / "run" / "config.yaml", {}) == spec


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Measurements(20, 64, False)),
        ({"eval_rows": 7}, Measurements(20, 7, True)),
        ({"early_stopping": 3}, Measurements(5, 64, True, 3)),
        ({"early_stopping": 3, "eval_every_steps": 9}, Measurements(9, None, True, 3)),
        ({"eval_every_steps": 9, "eval_rows": 7}, Measurements(9, 7, True)),
        ({"eval_every_steps": 0}, None),
    ],
)
def test_how_often_and_on_how_many_rows(
    changes: dict[str, Any], expected: Measurements | None
) -> None:
    spec = load_spec(None, {f"train.{name}": value for name, value in changes.items()}).train
    assert planned_measurements(spec, n_steps=100, n_sequences=6400) == expected


@pytest.mark.parametrize(("n_steps", "every_steps"), [(1, 1), (3, 1), (11, 3), (29, 6)])
def test_a_short_training_measures_a_few_rows_all_the_same(n_steps: int, every_steps: int) -> None:
    planned = planned_measurements(RunSpec().train, n_steps=n_steps, n_sequences=2 * n_steps)
    assert planned == Measurements(every_steps, 16, False)
