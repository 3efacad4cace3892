"""One run, one process: skipped when done, resumed when interrupted, noted when it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swlora.adapters.methods import adapt
from swlora.adapters.saved import save_adapter
from swlora.adapters.start import settled_start
from swlora.config import AdapterSpec, RunSpec, TrainSpec, dump_yaml, load_spec
from swlora.errors import UserError
from swlora.locks import lock_folder
from swlora.models.anatomy import Anatomy
from swlora.paths import cache_dir
from swlora.study.folder import StudyFolder
from swlora.study.live import Board
from swlora.study.one_process import child_command
from swlora.study.plan import Task
from swlora.study.runner import Outcome, Runner
from swlora.study.spec import StudySpec

SPEC = StudySpec.model_validate({"arms": ["lora"]})
TASK = Task("runs", "lora", "seed-0", "runs/lora/seed-0", RunSpec(seed=3), n_rows=64)


@pytest.fixture
def folder(tmp_path):
    with StudyFolder(tmp_path / "study", "s", SPEC) as folder:
        yield folder


@pytest.fixture
def run(folder, children, view):
    """A function (task=TASK, **act) -> its outcome; the act is what its process does."""
    runner = Runner(folder, Board(), view, children)

    def start(task=TASK, **act):
        children.acts = {task.folder: act}
        return runner.run(task)

    return start


def told(folder, task=TASK):
    facts = json.loads((folder.folder / "study.json").read_text())
    return facts["runs"][task.folder]


def test_a_run_is_a_process_that_leaves_a_folder(folder, run, children, view):
    assert run() == Outcome("done")
    assert (folder.folder / TASK.folder / "log.txt").read_text() == f"working in {TASK.folder}\n"
    facts = told(folder)
    assert facts.pop("seconds") > 0
    assert facts.pop("load_before") >= 0
    assert facts == {
        **{"phase": "runs", "arm": "lora", "label": "seed-0"},
        **{"status": "done", "reason": None},
    }
    assert view.lines[0].startswith(f"{TASK.folder} done in ")


def test_a_run_that_is_done_is_skipped(folder, run, children):
    run()
    seconds = told(folder)["seconds"]
    assert run(fail="not again") == Outcome("done")
    assert len(children.calls) == 1
    assert told(folder)["seconds"] == seconds


def test_a_run_that_is_done_with_other_settings_is_refused(run):
    run()
    other = Task(**{**vars(TASK), "spec": RunSpec(seed=3, train=TrainSpec(learning_rate=0.5))})
    with pytest.raises(UserError, match="holds a run with other settings"):
        run(other)


@pytest.mark.parametrize("method", ["lora", "lora+"])
def test_a_run_that_started_from_an_adapter_is_the_one_that_was_asked_for(
    method, folder, run, make_model, tmp_path
):
    """It notes place and settings of the adapter as its files have them."""
    start, settings = tmp_path / "start", {"rank": 3, "alpha": 6.0, "method": method}
    ratio = {"lora_plus_ratio": 8.0} if method == "lora+" else {}
    adapted = adapt(make_model("llama"), AdapterSpec(**settings, **ratio), [1, 2], seed=0)
    save_adapter(adapted.model, start, {"method": method, "settings": ratio})

    def task(**changes):
        asked = {**settings, "start": start, "layers": "last:2", **changes}
        spec = load_spec(None, {f"adapter.{name}": value for name, value in asked.items()})
        return Task("runs", "lora", "seed-0", "runs/lora/seed-0", spec)

    run(task())
    noted = settled_start(task().spec.adapter, Anatomy(make_model("llama")))
    assert noted != task().spec.adapter
    config = folder.folder / TASK.folder / "config.yaml"
    config.write_text(dump_yaml(task().spec.model_copy(update={"adapter": noted})))
    assert run(task(), fail="not again") == Outcome("done")
    others = [{"rank": 4}, {"dropout": 0.1}, {"start": tmp_path}]
    for other in [*others, {"lora_plus_ratio": 4.0}] if ratio else others:
        with pytest.raises(UserError, match="holds a run with other settings"):
            run(task(**other))


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ({"fail": "RunFailedError: no more space"}, "RunFailedError: no more space"),
        ({"die": True}, "its process was ended by SIGKILL"),
        ({"no_run": True}, "swlora: nothing here"),
    ],
)
def test_a_run_that_fails_is_noted_and_made_again(act, reason, folder, run, children, view):
    assert run(**act) == Outcome("failed", reason)
    assert (told(folder)["status"], told(folder)["reason"]) == ("failed", reason)
    assert view.lines[0].endswith(f": {reason}")
    (folder.folder / TASK.folder / "left.txt").touch()
    assert run() == Outcome("done")
    assert [call["resume"] for call in children.calls] == ["False", "False"]
    assert not (folder.folder / TASK.folder / "left.txt").exists()
    assert told(folder)["reason"] is None


@pytest.mark.parametrize(
    ("layers", "changes", "goes_on"),
    [
        ("super", {"adapter.rank": 9, "train.learning_rate": 0.5}, True),
        ("super", {"identify.windows": 2}, False),
        ("super", {"model.revision": "abc"}, False),
        ("auto:0.5", {"train.learning_rate": 0.5}, True),  # an older version's trials
        ("auto:0.5", {"adapter.rank": 9}, False),
    ],
)
def test_a_search_for_layers_is_kept_while_what_it_depends_on_is(layers, changes, goes_on, run):
    def task(changes):
        spec = load_spec(None, {"adapter.layers": layers, **changes})
        return Task("identify", "lora", layers, "identify/layers", spec)

    run(task({}))
    if goes_on:
        assert run(task(changes)) == Outcome("done")
    else:
        with pytest.raises(UserError, match="other settings than the study now asks for"):
            run(task(changes))


@pytest.mark.parametrize(
    "act",
    [
        {"fail": "DivergedError: ...", "error": {"code": "diverged", "message": "..."}},
        {"fail": "the loss or its gradient is not finite at step 3"},  # of an older version
    ],
)
def test_a_rate_that_is_too_high_is_an_answer(act, run, children):
    task = Task("rates", "lora", "9", "rates/lora/9", RunSpec())
    for _ in range(2):
        assert run(task, **act).has_diverged
    assert len(children.calls) == 1


@pytest.mark.parametrize(
    "act",
    [
        {"fail": "disk"},
        {"fail": "a number is not finite", "error": {"code": "failed", "message": "..."}},
    ],
)
def test_other_failures_of_a_rate_are_no_answer(act, run, children):
    task = Task("rates", "x", "9", "rates/x/9", RunSpec())
    for _ in range(2):
        assert not run(task, **act).has_diverged
    assert len(children.calls) == 2


def test_an_interruption_cancels_the_run_and_a_checkpoint_is_resumed(folder, run, children, view):
    view.stop_at = "hanging"
    with pytest.raises(KeyboardInterrupt):
        run(hang=True)
    first_s = told(folder)["seconds"]
    assert (told(folder)["status"], told(folder)["reason"]) == (
        *("cancelled", "the study was stopped"),
    )
    facts = json.loads((folder.folder / TASK.folder / "run.json").read_text())
    assert facts["status"] == "cancelled"
    view.stop_at = None
    assert run(hang=True) == Outcome("done")
    assert [call["resume"] for call in children.calls] == ["False", "True"]
    assert told(folder)["seconds"] > first_s


def test_a_second_interruption_kills(folder, run, children, view, monkeypatch):
    view.stop_at = "hanging"
    wait = subprocess.Popen.wait

    def interrupted(process, timeout=None):
        if timeout is None and process.returncode is None and not killed:
            killed.append(process.pid)
            raise KeyboardInterrupt
        return wait(process, timeout)

    killed: list[int] = []
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(hang=True)
    (call,) = children.calls
    assert killed == [call["pid"]]
    with pytest.raises(ProcessLookupError):
        os.kill(call["pid"], 0)


def test_a_short_run_is_never_resumed(run, children, view):
    task = Task("rates", "lora", "1", "rates/lora/1", RunSpec())
    view.stop_at = "hanging"
    with pytest.raises(KeyboardInterrupt):
        run(task, hang=True)
    view.stop_at = None
    run(task)
    assert [call["resume"] for call in children.calls] == ["False", "False"]


def test_a_run_of_a_study_that_was_killed_is_left_alone(folder, run):
    place = folder.folder / TASK.folder
    place.mkdir(parents=True)
    with lock_folder(place), pytest.raises(UserError, match="another process is at work"):
        run()
    assert run() == Outcome("done")


# The cache


def test_every_run_has_a_cold_cache_with_the_models_of_the_user(folder, run, children):
    (cache_dir() / "prefix" / "warm").mkdir(parents=True, exist_ok=True)
    model = cache_dir() / "some-model"
    model.mkdir(exist_ok=True)
    (model / "weights").touch()
    for seed in (0, 1):
        run(Task("runs", "a", f"seed-{seed}", f"runs/a/seed-{seed}", RunSpec()))
    caches = [call["cache"] for call in children.calls]
    assert len({*caches, str(cache_dir())}) == 3
    assert all(call["cached"].count("some-model") == 1 for call in children.calls)
    assert not any("prefix" in call["cached"] for call in children.calls)
    assert not any(Path(cache).exists() for cache in caches)  # it may hold gigabytes
    assert (model / "weights").exists()
    assert (cache_dir() / "prefix" / "warm").exists()


def test_a_resumed_run_keeps_its_cache(run, children, view):
    view.stop_at = "hanging"
    with pytest.raises(KeyboardInterrupt):
        run(hang=True)
    view.stop_at = None
    run()
    first, second = children.calls
    assert first["cache"] == second["cache"]
    assert "prefix" in second["cached"]


# The real commands


@pytest.mark.parametrize(
    ("task", "resume", "words"),
    [
        (TASK, False, "-m swlora train-eval --config C --output S/runs/lora/seed-0"),
        (TASK, True, "-m swlora train-eval --resume --output S/runs/lora/seed-0"),
        (
            Task("beam", "lora", "seed-0", "beam/lora/seed-0", RunSpec(), adapter=TASK.folder),
            False,
            "-m swlora eval --adapter S/runs/lora/seed-0 --config C --output S/beam/lora/seed-0",
        ),
        (
            Task("rates", "lora", "1", "rates/lora/1", RunSpec()),
            False,
            "-m swlora.study.work train --config C --output S/rates/lora/1",
        ),
        (
            Task("identify", "super", "super", "identify/super", RunSpec()),
            False,
            "-m swlora.study.work layers --config C --output S/identify/super",
        ),
    ],
)
def test_commands(task, resume, words):
    command = child_command(task, Path("S"), Path("C"), resume)
    assert command == [sys.executable, *words.split()]


def test_a_child_outlives_ctrl_c_of_the_terminal(run, children, view):
    """It is in a session of its own: only the study tells it to stop."""
    view.stop_at = "hanging"
    with pytest.raises(KeyboardInterrupt):
        run(hang=True)
    (call,) = children.calls
    assert call["session"] != os.getsid(0)
