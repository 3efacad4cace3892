"""Trainings from the page at work: one at a time, over restarts of the server; what is left."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import psutil
import pytest
from tests.support import fake_training
from tests.support.page_reading import look
from tests.support.page_training import HTML, estimate, is_gone, press, start, status_of
from tests.support.servers import until

from swlora.errors import RunFailedError, UserError
from swlora.locks import lock
from swlora.result_json import as_json
from swlora.web.training.errands import Errands
from swlora.web.training.made_files import gguf_path, gguf_state, merged_state
from swlora.web.training.worker import LOCK, NOTE, Job, Worker

KEY = "a-key-of-sixteen-or-more"


# A look at data


def test_a_look_shows_rows_with_trained_tokens_marked(trainer):
    answer = trainer.post("/train/look", data={"data": "rows.jsonl"})
    url = answer.headers["location"]
    assert (answer.status_code, url) == (303, "/train/with?data=rows.jsonl")
    until(lambda: "x-over" in trainer.get(f"{url}&part=look").headers)
    text = trainer.get(url, headers=HTML).text
    assert "<span>&lt;b&gt;Hi&lt;/b&gt;↵\n</span><mark>you</mark>" in text
    assert '<mark class="special">&lt;/s&gt;</mark>' in text
    assert "rows.jsonl, line 1: 4 tokens" in text and "/srv" not in text
    assert "2 rows cannot be used" in text and "1 row is longer" in text
    look(trainer, url)


def test_a_look_that_fails_says_why_without_a_path(trainer, tmp_path):
    answer = trainer.post("/train/look", data={"data": "more/broken.jsonl", "columns": "text=a"})
    url = answer.headers["location"]
    assert url == "/train/with?data=more%2Fbroken.jsonl&columns=text%3Da"
    until(lambda: "x-over" in trainer.get(f"{url}&part=look").headers)
    text = look(trainer, url).text
    assert "broken.jsonl: name yours with Columns" in text and str(tmp_path) not in text
    wrong = trainer.post("/train/look", data={"data": "rows.jsonl", "columns": "x=y"})
    assert wrong.status_code == 400 and "Columns: " in wrong.text


def test_an_estimate_shows_time_memory_and_a_refusal_and_nothing_begins(trainer, tmp_path):
    url, page = estimate(trainer, tmp_path / "hold", layers="last:2")
    (tmp_path / "hold").unlink()
    until(lambda: "x-over" in trainer.get(url + "&seen=").headers)
    text = trainer.get(url + "&seen=").text
    for said in ("about 2 min", "1,200", "2.5 GB", "2.0 MB", "1–2", "4,608"):
        assert f"<dd>{said}</dd>" in text
    assert "would not begin: runs: the disk has less room; use fewer Epochs" in text
    assert 'value="last:2"' in page and list((tmp_path / "runs").iterdir()) == []
    assert start(trainer, 400, action="estimate", rank="0")
    start(trainer)
    assert "one at a time" in start(trainer, 400, action="estimate", epochs="3")


def test_an_estimate_is_of_the_folder_of_runs_made_anew_and_ended_by_a_training(
    trainer, child, tmp_path
):
    hold = tmp_path / "hold"
    url, _ = estimate(trainer, hold)
    hold.unlink()
    until(lambda: "x-over" in trainer.get(url).headers)
    arguments = json.loads(child.read_text())["arguments"]  # not of where the server was started
    assert f"--output={tmp_path / 'runs/mine'}" in arguments
    child.unlink()
    assert estimate(trainer, hold)[0] == url
    until(child.exists)
    assert "ask again" in trainer.get("/train/estimate?key=of-another-server").text
    start(trainer)  # while it is held
    until(lambda: "x-over" in trainer.get(url).headers)
    assert "ended before it was done" in trainer.get(url).text


def test_what_cannot_be_started_says_so_and_can_be_asked_for_again(trainer, monkeypatch, tmp_path):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(subprocess, "Popen", full)
        answer = trainer.post("/train/look", data={"data": "rows.jsonl"})
        assert answer.status_code == 400 and "No space left on device" in answer.text
        assert "it cannot be started: No space left" in start(trainer, 400)
    url = trainer.post("/train/look", data={"data": "rows.jsonl"}).headers["location"]
    until(lambda: "x-over" in trainer.get(f"{url}&part=look").headers)
    assert "line 1: 4 tokens" in look(trainer, url).text
    start(trainer, epochs="1")
    until(lambda: status_of(tmp_path / "runs") == "done")


def test_the_last_look_takes_the_place_of_others(tmp_path):
    errands, fake = Errands(), fake_training.__file__
    command = [sys.executable, shutil.copy(fake, tmp_path), "data"]
    for key in ("slow", "quick"):
        errands.ask(key, lambda result, key=key: [*command, f"--dataset={key}", f"--json={result}"])
    until(lambda: all(errand.is_over for errand in map(errands.of, ("slow", "quick")) if errand))
    slow, quick = errands.of("slow"), errands.of("quick")
    assert slow and slow.result is None and "ended before" in slow.problem
    assert quick and quick.result == fake_training.LOOK
    errands.ask("slow", lambda _: [sys.executable, "-c", "pass"])
    first = errands.of("slow")
    errands.end()
    errands.ask("slow", lambda _: [sys.executable, "-c", "pass"])
    second = errands.of("slow")
    assert second and second is not first  # which was ending
    until(lambda: second.is_over)
    assert second.problem == "its result cannot be shown: No such file or directory"


def test_a_look_has_its_time(tmp_path):
    errands = Errands(timeout_s=0.1)
    command = [sys.executable, fake_training.__file__, "data", "--dataset=slow"]
    command[1] = str(shutil.copy(command[1], tmp_path))
    errands.ask("x", lambda result: [*command, f"--json={result}"])
    found = errands.of("x")
    assert found
    until(lambda: found.is_over)
    assert "more than 0 s" in found.problem


# A training


def test_a_training_is_a_list_of_arguments(trainer, child, data, tmp_path, loaded, monkeypatch):
    monkeypatch.setenv("SWLORA_API_KEY", KEY)
    layers = "last:2"
    ticks = {"skip_bad_rows": "1", "find_learning_rate": "1"}
    assert start(trainer, layers=layers, epochs="1", rank="", **ticks) == "/runs/mine"
    until(child.exists)
    said = json.loads(child.read_text())
    assert said["key"] == ""
    assert said["arguments"][0] == "train" and set(said["arguments"][1:]) == {
        f"--model={loaded.name}",
        f"--dataset={data / 'rows.jsonl'}",
        f"--layers={layers}",
        "--method=lora",
        "--epochs=1",
        "--skip-bad-rows",
        "--find-learning-rate",
        f"--output={tmp_path / 'runs/mine'}",
    }
    until(lambda: status_of(tmp_path / "runs") == "done")
    until(lambda: "Merge into a model" in look(trainer, "/runs/mine").text)
    for action in ("", "estimate"):
        assert "there is a run named mine already" in start(trainer, 400, action=action)


def test_one_at_a_time_whichever_server_looks(open_app, tmp_path):
    """A server that ends leaves the training at work; the next one finds it, and stops it."""
    runs, first = tmp_path / "runs", open_app()
    start(first)
    assert "one at a time" in start(first, 400, name="other")
    until((runs / "mine/ready").exists)
    second = open_app(instead_of=first)
    assert status_of(runs) == "running"
    assert "mine is at work" in start(second, 400, name="other")
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == ["mine"]
    assert "At work now: mine" in look(second, "/train").text
    assert "goes on where this server is stopped" in look(second, "/runs/mine").text
    press(second, "resume", status=409)
    press(second, "stop", run="other", status=409)
    press(second, "stop")
    until(lambda: status_of(runs) == "cancelled")
    until(lambda: "Resume" in look(second, "/runs/mine").text)
    press(second, "stop", status=409)
    press(second, "resume")
    until(lambda: status_of(runs) == "done")


def test_a_training_that_was_killed_is_said_to_be_gone(trainer, tmp_path):
    start(trainer)
    until((tmp_path / "runs/mine/ready").exists)
    press(trainer, "kill")
    until(lambda: "its process is gone" in look(trainer, "/runs/mine").text)
    assert status_of(tmp_path / "runs") == "running"
    press(trainer, "resume")
    until(lambda: status_of(tmp_path / "runs") == "done")


def test_a_training_that_does_not_begin_says_why_and_leaves_its_name(trainer, tmp_path):
    start(trainer, data="more/broken.jsonl")
    until(lambda: "did not begin" in trainer.get("/runs/mine").text)
    page = look(trainer, "/runs/mine")
    assert "broken.jsonl, line 2: no prompt" in page.text and str(tmp_path) not in page.text
    start(trainer, epochs="1")
    until(lambda: status_of(tmp_path / "runs") == "done")


def test_an_adapter_is_taken_away_merged_and_exported(trainer, tmp_path):
    run = tmp_path / "runs/mine"
    for action in ("merge", "export"):
        press(trainer, action, status=404)
    start(trainer, epochs="1")
    until(lambda: "Merge into a model" in trainer.get("/runs/mine", headers=HTML).text)
    (run / "adapter/link").symlink_to(tmp_path / "outside.jsonl")
    answer = trainer.get("/train/adapter?run=mine")
    packed = zipfile.ZipFile(io.BytesIO(answer.content))
    assert packed.namelist() == ["adapter/adapter_model.safetensors", "adapter/swlora.json"]
    assert packed.read("adapter/adapter_model.safetensors") == b"weights"
    assert 'filename="mine-adapter.zip"' in answer.headers["content-disposition"]
    assert "merge it first" in press(trainer, "export", status=409, type="q8_0")
    press(trainer, "merge")
    until(lambda: "Write as GGUF" in trainer.get("/runs/mine", headers=HTML).text)
    for kind in ("", "../x", "q4"):
        press(trainer, "export", status=409, type=kind)
    press(trainer, "export", type="f16")
    until(lambda: "That did not work: else: the disk is full" in look(trainer, "/runs/mine").text)
    press(trainer, "export", type="q8_0")
    until(lambda: "Merged model as GGUF" in trainer.get("/runs/mine", headers=HTML).text)
    assert trainer.get("/train/gguf/q8_0?run=mine").content.startswith(b"GGUF")
    for path in ("/train/gguf/f16?run=mine", "/train/gguf/x?run=mine", "/train/adapter?run=no"):
        assert trainer.get(path).status_code == 404


def test_what_was_made_before_a_training_went_on_is_not_offered(trainer, tmp_path):
    """The command line went on with the run, say; the server was told nothing of it."""
    run = tmp_path / "runs/mine"
    start(trainer, epochs="1")
    until(lambda: "Merge into a model" in trainer.get("/runs/mine", headers=HTML).text)
    press(trainer, "merge")
    until(lambda: "Write as GGUF" in trainer.get("/runs/mine", headers=HTML).text)
    press(trainer, "export", type="q8_0")
    until(lambda: "Merged model as GGUF" in trainer.get("/runs/mine", headers=HTML).text)
    first = trainer.get("/train/gguf/q8_0?run=mine").content
    fake_training.save_adapter(run, b"weights of more epochs")
    page = look(trainer, "/runs/mine").text
    assert "is not of the adapter as it is now: the training went on" in page
    assert "Merged model as GGUF" not in page and "Write as GGUF" not in page
    assert "merge it again" in trainer.get("/train/gguf/q8_0?run=mine").text
    assert "merge it first" in press(trainer, "export", status=409, type="q8_0")
    press(trainer, "merge")
    until(lambda: "Write as GGUF" in trainer.get("/runs/mine", headers=HTML).text)
    assert not (run / "merged-q8_0.gguf").exists()
    press(trainer, "export", type="q8_0")
    until(lambda: "Merged model as GGUF" in trainer.get("/runs/mine", headers=HTML).text)
    again = trainer.get("/train/gguf/q8_0?run=mine").content
    assert again.startswith(b"GGUF") and again != first


def test_a_merge_of_an_older_version_is_known_by_its_date(tmp_path):
    (tmp_path / "merged").mkdir()
    assert merged_state(tmp_path) == "old"  # of what adapter?
    fake_training.save_adapter(tmp_path, b"weights")
    (tmp_path / "merged/swlora-merge.json").write_text("{}")
    for name in ("q8_0", "f16"):
        gguf_path(tmp_path, name).write_bytes(b"GGUF")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    os.utime(weights, (1000, 1000))
    os.utime(gguf_path(tmp_path, "f16"), (999, 999))
    assert merged_state(tmp_path) == gguf_state(tmp_path, "q8_0") == "current"
    assert gguf_state(tmp_path, "f16") == "old"
    os.utime(tmp_path / "merged/swlora-merge.json", (999, 999))
    assert merged_state(tmp_path) == "old"


def test_what_swlora_did_not_merge_is_not_removed(trainer, tmp_path):
    start(trainer, epochs="1")
    until(lambda: "Merge into a model" in trainer.get("/runs/mine", headers=HTML).text)
    own = tmp_path / "runs/mine/merged"
    own.mkdir()
    os.utime(own, (1000, 1000))
    assert "was not merged by swlora" in press(trainer, "merge", status=409)
    assert own.is_dir()


def test_an_adapter_that_is_a_link_out_of_its_run_is_not_sent(trainer, tmp_path):
    start(trainer, epochs="1")
    until(lambda: "Merge into a model" in trainer.get("/runs/mine", headers=HTML).text)
    (tmp_path / "runs/mine/adapter").rename(tmp_path / "elsewhere")
    (tmp_path / "runs/mine/adapter").symlink_to(tmp_path / "elsewhere")
    assert trainer.get("/train/adapter?run=mine").status_code == 404


@pytest.mark.parametrize(
    ("is_stopping", "said"),
    [(True, "It was stopped before its end"), (False, "ended without a word")],
)
def test_a_merge_that_was_killed_is_not_told_by_the_log_of_the_training(
    trainer, tmp_path, is_stopping, said
):
    run = tmp_path / "runs/mine"
    start(trainer, epochs="1")
    until(lambda: "Merge into a model" in trainer.get("/runs/mine", headers=HTML).text)
    (run / "log.txt").write_text("run folder: mine\n")
    job = Job("merge", "mine", 1, 0.0, (run / "log.txt").stat().st_size, is_stopping)
    (run.parent / NOTE).write_text(json.dumps(as_json(job)))
    text = look(trainer, "/runs/mine").text
    assert said in text and "run folder: mine" not in text


def test_what_is_ended_at_once_takes_along_what_it_has_started(tmp_path):
    (tmp_path / "mine").mkdir()
    code = (
        "import pathlib, subprocess, sys, time; other = subprocess.Popen(['sleep', '60']); "
        "pathlib.Path(sys.argv[1], 'pid').write_text(str(other.pid)); time.sleep(60)"
    )
    worker, run = Worker(tmp_path), tmp_path / "mine"
    worker.start("gguf", "mine", [sys.executable, "-c", code, str(run)])
    until(lambda: (run / "pid").exists() and (run / "pid").read_text())
    other = psutil.Process(int((run / "pid").read_text()))
    worker.stop("mine", at_once=True)
    until(lambda: worker.now() is None)
    until(lambda: is_gone(other))


@pytest.mark.parametrize("is_full", [False, True])
def test_a_second_stop_does_not_end_a_training_without_its_checkpoint(
    tmp_path, monkeypatch, is_full
):
    """It takes the second SIGTERM for "at once"; on a full disk nothing notes the first one."""
    code = (
        "import pathlib, signal, sys, time; heard = pathlib.Path(sys.argv[1], 'heard'); "
        "signal.signal(signal.SIGTERM, lambda *_: heard.open('a').write('x')); "
        "heard.touch(); time.sleep(60); time.sleep(60)"
    )
    worker, heard = Worker(tmp_path), tmp_path / "mine/heard"
    heard.parent.mkdir()
    worker.start("train", "mine", [sys.executable, "-c", code, str(heard.parent)])
    until(heard.exists)

    def full(*_: object) -> None:
        raise RunFailedError("No space left on device")

    if is_full:
        monkeypatch.setattr("swlora.web.training.worker.write_json", full)
    worker.stop("mine", at_once=False)
    until(lambda: heard.read_text() == "x")
    for looking in [worker] if is_full else [worker, Worker(tmp_path)]:
        looking.stop("mine", at_once=False)
        job = looking.now()
        assert job and job.is_stopping
    time.sleep(0.3)  # in which a second signal would arrive
    assert heard.read_text() == "x"
    worker.stop("mine", at_once=True)
    until(lambda: worker.now() is None)


def test_a_note_of_another_process_stops_nothing(tmp_path):
    """Its number may belong to somebody else by now."""
    note = Job("train", "mine", os.getpid(), 0.0)
    (tmp_path / NOTE).write_text(json.dumps(as_json(note)))
    held = lock(tmp_path / LOCK, alone=True, make=True)
    assert held
    with held, pytest.raises(UserError, match="cannot be found"):
        Worker(tmp_path).stop("mine", at_once=False)
    assert Worker(tmp_path).now() is None
