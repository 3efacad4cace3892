"""The run folder: how a run ends is recorded, nothing is overwritten."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swlora.config import AdapterSpec, RunSpec, load_spec
from swlora.errors import DivergedError, RunFailedError, UserError
from swlora.files import check_writable
from swlora.run_place import default_folder
from swlora.runs import Run, read_run
from swlora.snapshots import Snapshot, has_snapshot, save_snapshot
from swlora.work_folder import Failure, failure_of

SNAPSHOT = Snapshot(1, {"x": torch.ones(2)}, {})
SPEC = RunSpec(adapter=AdapterSpec(rank=7), seed=5)


def start(folder: Path, command: str = "train") -> Run:
    return Run.create(folder, SPEC, command)


def ended(folder: Path, error: BaseException | None = None, command: str = "train") -> Run:
    """A run that is over."""
    run = start(folder, command)
    if error is None:
        with run:
            pass
    else:
        with pytest.raises(type(error)), run:
            raise error
    return run


# What a run says of itself


def test_a_new_run_explains_itself(tmp_path):
    run = start(tmp_path / "a" / "run")
    facts = json.loads((run.folder / "run.json").read_text())
    assert facts["status"] == "running"
    assert (facts["command"], facts["seed"]) == ("train", 5)
    assert facts["packages"]["torch"] == torch.__version__
    assert set(facts["packages"]) >= {"swlora", "transformers", "peft"}
    assert all(facts[key] for key in ("started_at", "python", "machine"))
    assert load_spec(run.folder / "config.yaml", {}) == SPEC


@pytest.mark.parametrize(
    ("error", "status", "reason", "code", "message"),
    [
        (None, "done", None, None, None),
        (
            *(RunFailedError("no more space"), "failed", "RunFailedError: no more space"),
            *("failed", "no more space"),
        ),
        (UserError("no"), "failed", "UserError: no", "bad_input", "no"),
        (DivergedError("too high"), "failed", "DivergedError: too high", "diverged", "too high"),
        (ValueError(), "failed", "ValueError", "unexpected", "ValueError"),
        (
            *(KeyboardInterrupt("after step 3"), "cancelled", "KeyboardInterrupt: after step 3"),
            *("cancelled", "after step 3"),
        ),
        (SystemExit(1), "cancelled", "SystemExit: 1", "cancelled", "1"),
    ],
)
def test_how_it_ended(error, status, reason, code, message, tmp_path):
    run = ended(tmp_path, error)
    facts = read_run(tmp_path)
    assert facts == run.facts
    assert (facts["status"], facts.get("reason")) == (status, reason)
    assert facts.get("error") == (None if error is None else {"code": code, "message": message})
    assert failure_of(facts) == (None if error is None else Failure(code, message))
    assert facts["timings_s"]["total"] >= 0


@pytest.mark.parametrize(
    ("facts", "failure"),
    [
        ({"reason": "RunFailedError: x is not finite"}, ("diverged", "x is not finite")),
        ({"reason": "UserError: no such layer: x"}, ("", "no such layer: x")),
        ({"reason": "killed"}, ("", "killed")),
        ({"reason": "UserError: not finite", "error": {"code": "bad_input"}}, ("bad_input", "")),
        ({"reason": None}, None),
        ({}, None),
    ],
)
def test_how_runs_of_older_versions_ended(facts, failure):
    assert failure_of(facts) == (None if failure is None else Failure(*failure))


def test_a_resumed_run_may_end_better(tmp_path):
    ended(tmp_path, RunFailedError("no more space"))
    run, spec = Run.reopen(tmp_path, "train")
    assert spec == SPEC
    with run:
        assert read_run(tmp_path)["status"] == "running"
        assert not read_run(tmp_path).keys() & {"reason", "error"}
        run.record(n=3)
        run.add_timing("train", 1.25)
        run.add_timing("train", 0.5)
    facts = read_run(tmp_path)
    assert (facts["status"], facts["n"], facts["resumed"]) == ("done", 3, 1)
    assert facts["timings_s"]["train"] == 1.75
    assert not facts.keys() & {"reason", "error"}


def test_a_done_run_that_is_trained_on_elsewhere_is_at_work_there(tmp_path):
    """Where it was killed, its lock is asked on the machine that `host` names."""
    with start(tmp_path) as run:
        save_snapshot(run.checkpoint, SNAPSHOT)
    facts = read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(facts | {"host": "elsewhere"}))
    run, spec = Run.reopen(tmp_path, "train", {"train.epochs": 9})
    with run:
        assert read_run(tmp_path)["host"] == "elsewhere"  # nothing is to be done so far
        run.begin(spec)
        noted = read_run(tmp_path)
    assert (noted["status"], noted["host"]) == ("running", platform.node())


def test_only_a_finished_run_that_cannot_be_extended_drops_its_checkpoint(tmp_path):
    for error in (KeyboardInterrupt(), RunFailedError("x")):
        run = start(tmp_path / type(error).__name__)
        save_snapshot(run.checkpoint, SNAPSHOT)
        with pytest.raises(type(error)), run:
            raise error
        assert has_snapshot(run.checkpoint)
    for method, is_kept in (("lora", True), ("full", False)):
        spec = RunSpec(adapter=AdapterSpec(method=method))
        run = Run.create(tmp_path / method, spec, "train")
        with run:
            save_snapshot(run.checkpoint, SNAPSHOT)
        assert run.checkpoint.exists() == is_kept


def test_results_come_part_by_part(tmp_path):
    run = start(tmp_path)
    run.write_result({"identify": {"layers": [1]}})
    run.write_result({"train": {"loss": 1.5}})
    run.write_result({"train": {"loss": 0.5}})
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "identify": {"layers": [1]},
        "train": {"loss": 0.5},
    }
    with pytest.raises(RunFailedError, match="not finite"):
        run.write_result({"eval": {"nll": float("nan")}})
    assert set(json.loads((tmp_path / "result.json").read_text())) == {"identify", "train"}


def test_a_run_that_came_too_late_spares_the_checkpoint_of_the_other(tmp_path):
    late = Run.prepare(tmp_path / "run", RunSpec(), "generate")
    first = Run.create(tmp_path / "run", RunSpec(), "train")
    with first:
        save_snapshot(first.checkpoint, SNAPSHOT)
        with pytest.raises(UserError, match="another process is at work"), late:
            pass
        assert has_snapshot(first.checkpoint)


def test_a_run_that_cannot_start_is_not_in_use(tmp_path):
    run = Run.create(tmp_path / "run", RunSpec(), "train")
    facts = (tmp_path / "run" / "run.json").read_text()
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError), run:
        pass
    (tmp_path / "run" / "run.json").write_text(facts)
    again, _ = Run.reopen(tmp_path / "run", "train")
    with again:
        pass


def test_a_resumed_run_must_work_on_the_same(tmp_path):
    run = start(tmp_path)
    run.record_source(data_sha256="aa", revision=None)
    run.record_source(data_sha256="aa", revision=None)
    with pytest.raises(UserError, match="cannot go on: data_sha256 was aa and is now bb"):
        run.record_source(data_sha256="bb")
    assert read_run(tmp_path)["data_sha256"] == "aa"


def test_what_a_run_goes_on_from_is_read_under_its_lock(tmp_path):
    """A process that ends between a reading and the lock would have its facts written over."""
    ended(tmp_path, KeyboardInterrupt())
    run, _ = Run.reopen(tmp_path, "train")
    with pytest.raises(UserError, match="another process is at work in"):
        Run.reopen(tmp_path, "train")
    with run:
        pass
    with pytest.raises(UserError, match="is done"):
        Run.reopen(tmp_path, "train")
    (tmp_path / "run.json").write_text("{")
    for _ in range(2):  # what cannot be read is not locked for good
        with pytest.raises(UserError, match=r"no readable run\.json"):
            Run.reopen(tmp_path, "train")


# When a folder is made


def test_a_mistake_before_the_work_leaves_no_folder(tmp_path):
    folder = tmp_path / "a" / "run"
    for error in (UserError("no such model"), KeyboardInterrupt(), ValueError("x")):
        run = Run.prepare(folder, SPEC, "train")
        with pytest.raises(type(error)), run:
            run.record(n=1)
            run.add_timing("load_model", 1.0)
            raise error
    assert list(tmp_path.iterdir()) == []


def test_what_fails_after_the_work_began_is_recorded(tmp_path):
    with pytest.raises(UserError), Run.prepare(tmp_path / "run", SPEC, "train") as run:
        run.record(n=1)
        run.begin()
        assert read_run(run.folder)["n"] == 1
        run.begin()  # a second time changes nothing
        raise UserError("no more space")
    facts = read_run(tmp_path / "run")
    assert (facts["status"], facts["reason"]) == ("failed", "UserError: no more space")
    assert load_spec(tmp_path / "run" / "config.yaml", {}) == SPEC


def test_a_run_that_only_ends_well_is_recorded_too(tmp_path):
    with Run.prepare(tmp_path / "run", SPEC, "generate"):
        pass
    assert read_run(tmp_path / "run")["status"] == "done"


def test_a_run_begins_with_what_it_was_settled_on(tmp_path):
    settled = RunSpec(seed=6)
    with Run.prepare(tmp_path / "run", SPEC, "train") as run:
        run.begin(settled)
    assert load_spec(tmp_path / "run" / "config.yaml", {}) == settled


def test_of_two_that_were_prepared_the_first_to_begin_has_the_folder(tmp_path):
    folder = tmp_path / "run"
    first, second, third = (Run.prepare(folder, SPEC, "train") for _ in range(3))
    with pytest.raises(UserError, match="another process is at work in"), first, second:
        first.begin()
        second.begin()
    assert read_run(folder)["status"] == "failed"
    (folder / "metrics.jsonl").write_text("{}\n")
    before = (folder / "run.json").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run \(failed\)"), third:
        third.begin()
    assert (folder / "run.json").read_bytes() == before


def test_default_folders_are_taken_when_runs_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260102-030405")
    runs = [Run.prepare(None, SPEC, "eval") for _ in range(3)]
    assert not Path("runs").exists()
    for run in runs:
        with run:
            run.begin()
    stem = "eval-20260102-030405"
    assert [run.folder.name for run in runs] == [stem, f"{stem}-2", f"{stem}-3"]
    assert all(read_run(run.folder)["status"] == "done" for run in runs)


def test_an_output_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(
            UserError, match="file is a file and no folder; choose another --output"
        ):
            start(folder)
    if Path("/proc/self").exists():
        with pytest.raises(UserError, match=r"cannot make /proc/run: .*; choose another --output"):
            start(Path("/proc/run"))
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="may not be written in; choose another --output"):
        start(tmp_path / "a" / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_an_output_behind_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    """`Path.exists` raises there, up to Python 3.13."""
    exists = Path.exists

    def entered(path: Path) -> bool:
        if "closed" in path.parent.parts:
            raise PermissionError(13, "Permission denied")
        return exists(path)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(Path, "exists", entered)
    monkeypatch.setattr("os.access", lambda path, _: Path(path).name != "closed")
    with pytest.raises(UserError, match="closed may not be written in; choose another --output"):
        check_writable(tmp_path / "closed" / "a" / "run", "--output")


# What is there already


@pytest.mark.parametrize("command", ["train", "train-eval", "eval", "identify"])
@pytest.mark.parametrize("status", ["running", "done", "failed", "cancelled"])
def test_an_existing_run_is_not_overwritten(status, command, tmp_path):
    errors = {"failed": ValueError("x"), "cancelled": KeyboardInterrupt("x")}
    if status == "running":
        start(tmp_path, command)
    else:
        ended(tmp_path, errors.get(status), command)
    (tmp_path / "metrics.jsonl").write_text("")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    said = "killed" if status == "running" else status  # no process is at work
    with pytest.raises(UserError, match=rf"already holds a run \({said}\)") as refused:
        start(tmp_path)
    can_resume = status != "done" and command in ("train", "train-eval")
    assert ("--resume" in str(refused.value)) == can_resume
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_came_to_nothing_may_be_started_again(tmp_path):
    """After a typo in --model, the same --output shall do."""
    ended(tmp_path, UserError("there is no such model"))
    start(tmp_path, "eval")
    assert read_run(tmp_path)["command"] == "eval"


def test_other_peoples_files_are_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: true\n")
    with pytest.raises(UserError, match=r"holds a config\.yaml of something else"):
        start(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "mine: true\n"
    with pytest.raises(UserError, match="is a file and no folder"):
        start(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").rename(tmp_path / "notes.yaml")
    start(tmp_path)  # a folder with other files will do
    assert (tmp_path / "notes.yaml").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '{"status": "done"}', "\udcff"])
def test_a_run_json_that_cannot_be_read(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    for use in (lambda: read_run(tmp_path), lambda: start(tmp_path)):
        with pytest.raises(UserError, match=r"no readable run\.json"):
            use()


def test_what_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        Run.reopen(tmp_path, "train")
    ended(tmp_path / "done")
    with pytest.raises(UserError, match="is done; there is nothing to resume"):
        Run.reopen(tmp_path / "done", "train")
    ended(tmp_path / "other", ValueError("x"), "identify")
    with pytest.raises(UserError, match="a run of identify, not of train"):
        Run.reopen(tmp_path / "other", "train")


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    """Even where the first one seems dead; the lock goes with its process, however that ends."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom swlora.config import RunSpec\n"
        "from swlora.runs import Run\n"
        "with Run.create(Path(sys.argv[1]), RunSpec(), 'train'):\n"
        "    print('in', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        before = (tmp_path / "run" / "run.json").read_bytes()
        with pytest.raises(UserError, match="another process is at work in"):
            Run.reopen(tmp_path / "run", "train")
        assert (tmp_path / "run" / "run.json").read_bytes() == before
        other.kill()
    run, _ = Run.reopen(tmp_path / "run", "train")
    with run:
        pass
    assert read_run(tmp_path / "run")["status"] == "done"


def test_default_folders_are_fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260102-030405")
    names = []
    for _ in range(3):
        names.append(default_folder("eval"))
        names[-1].mkdir(parents=True)
    stem = "eval-20260102-030405"
    assert [str(name) for name in names] == [f"runs/{stem}{end}" for end in ("", "-2", "-3")]
