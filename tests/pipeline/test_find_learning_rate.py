"""`--find-learning-rate` through the pipeline: what is noted, kept on resuming, and refused."""

from types import SimpleNamespace

import pytest
from tests.support.small_runs import Heard
from tests.support.whole_jobs import StopsIn, make_spec, resume, run_in, same_adapters

from swlora import pipeline
from swlora.config import load_spec
from swlora.errors import UserError
from swlora.job import Job
from swlora.progress import Silent
from swlora.run_record import MemoryRecord
from swlora.runs import Run, read_result, read_run
from swlora.training import rate_trial

pytestmark = pytest.mark.usefixtures("no_drawings")


def finding(model, rows, **changes):
    settings = {"train__learning_rate": None, "train__find_learning_rate": True}
    settings |= {"train__checkpoint_every_s": 1e-9}
    return make_spec(model, rows, **settings | changes)


def no_trial(monkeypatch):
    """From now on a trial is an error."""
    monkeypatch.setattr(rate_trial, "choose", lambda *_: pytest.fail("it tried"))


@pytest.mark.parametrize(("layers", "first"), [("all", "0.001"), ("last:1", "0.0017")])
def test_the_found_rate_is_that_of_the_training_and_is_kept(
    model_folder, rows, tmp_path, monkeypatch, layers, first
):
    """It ends as a training that is given the rate, also stopped in a trial or after it."""
    model = model_folder("llama")
    spec = finding(model, rows, adapter__layers=layers)
    with Run.prepare(tmp_path / "found", spec, "train") as run:
        trained = pipeline.train(Job(spec, run, heard := Heard()))
    found = read_result(tmp_path / "found")["found_rate"]
    rate = found["learning_rate"]
    assert trained.course.learning_rate == rate == read_run(run.folder)["fitted"]["learning_rate"]
    assert f"learning rate {rate:g}: {found['reason']}" in heard.lines
    assert read_run(run.folder)["timings_s"]["find_learning_rate"] > 0
    assert load_spec(run.folder / "config.yaml", {}).train.learning_rate is None
    given = make_spec(model, rows, adapter__layers=layers, train__learning_rate=rate)
    run_in(tmp_path / "given", given, "train")
    for n, task in ((2, f"try a rate of {first}"), (1, "train"), (3, "train")):
        folder = tmp_path / f"{task}-{n}"
        with pytest.raises(KeyboardInterrupt):
            run_in(folder, spec, "train", StopsIn(task, n))
        with monkeypatch.context() as afterwards:
            if task == "train":
                no_trial(afterwards)
            resume(folder)
        assert read_run(folder)["fitted"]["learning_rate"] == rate
        assert same_adapters(folder, tmp_path / "given")
    assert same_adapters(tmp_path / "found", tmp_path / "given")


def test_a_run_that_goes_on_may_be_given_another_rate(model_folder, rows, tmp_path, monkeypatch):
    spec = finding(model_folder("llama"), rows)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "run", spec, "train", StopsIn("train", 4))
    no_trial(monkeypatch)
    run, changed = Run.reopen(tmp_path / "run", "train", {"train.learning_rate": 0.005})
    with run:
        trained = pipeline.train(Job(changed, run, Silent()))
        rates = [row["learning_rate"] for row in run.metrics()]
    facts = read_run(tmp_path / "run")
    n, n_before = len(rates), facts["changes"][0]["step"]
    assert n_before >= 2
    before, after = rates[:n_before], rates[n_before:]
    falling = [1 - i / (n - 1) for i in range(n)]  # after one step of warm-up
    found = facts["fitted"]["learning_rate"]
    assert before[1:] == pytest.approx([found * f for f in falling[: n_before - 1]])
    assert after == pytest.approx([0.005 * f for f in falling[n_before - 1 : -1]])
    assert trained.course.learning_rate == 0.005


@pytest.mark.parametrize(
    "settings",
    [{}, {"adapter__layers": "super", "train__find_learning_rate": False}],
    ids=["tried", "of found layers"],
)
def test_a_run_that_goes_on_with_other_settings_keeps_its_rate(
    model_folder, rows, tmp_path, monkeypatch, settings
):
    found = SimpleNamespace(layers=[1], removal_layers=[])
    monkeypatch.setattr(pipeline, "identify", lambda _job: found)
    run_in(tmp_path / "run", finding(model_folder("llama"), rows, **settings), "train")
    rate = read_result(tmp_path / "run")["train"]["learning_rate"]
    assert rate != 1e-3
    no_trial(monkeypatch)
    run, changed = Run.reopen(tmp_path / "run", "train", {"train.epochs": 5})
    with run:
        trained = pipeline.train(Job(changed, run, Silent()))
        rates = [row["learning_rate"] for row in run.metrics()]
    assert trained.course.learning_rate == rate
    assert len(rates) == 20 and rates[12] == pytest.approx(rate * (1 - 11 / 19))


def test_layers_are_found_first(model_folder, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "measure_layers", lambda *_: [2])
    spec = finding(model_folder("llama"), rows, adapter__layers="auto:0.5")
    run_in(tmp_path / "run", spec, "train")
    result = read_result(tmp_path / "run")
    assert result["train"]["layers"] == [2]
    tried = [trial["learning_rate"] for trial in result["found_rate"]["trials"]]
    assert {1.7e-3, 3.4e-3} <= set(tried)


def test_a_training_without_a_folder_finds_one_too(model_folder, rows):
    record = MemoryRecord()
    trained = pipeline.train(Job(finding(model_folder("llama"), rows), record, Silent()))
    assert record.facts["fitted"]["learning_rate"] == trained.course.learning_rate


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("llama", {"train__learning_rate": 0.01}, "tries rates, and --learning-rate is set"),
        ("llama", {"adapter__method": "pissa"}, "and not --method pissa"),
        ("llama", {"adapter__method": "adalora"}, "tries lora, lora[+], rslora, dora, and not"),
        ("falcon", {}, "--find-learning-rate needs prefix trees, which this family cannot run"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_the_run(
    model_folder, rows, tmp_path, model, changes, said
):
    spec = finding(model_folder(model), rows, **changes)
    run = Run.prepare(tmp_path / "run", spec, "train")
    with pytest.raises(UserError, match=said), run:
        pipeline.train(Job(spec, run, Silent()))
    assert not (tmp_path / "run").exists()


def test_an_adapter_to_start_from_is_refused(model_folder, rows, tmp_path):
    model = model_folder("llama")
    run_in(tmp_path / "first", make_spec(model, rows), "train")
    spec = finding(model, rows, adapter__start=str(tmp_path / "first"))
    with pytest.raises(UserError, match="and --adapter starts from another"):
        pipeline.train(Job(spec, MemoryRecord(), Silent()))
