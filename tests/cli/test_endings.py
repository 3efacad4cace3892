"""How a command ends: where it can go on, by a signal, or in one line that says why."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swlora import pipeline
from swlora.cli import main
from swlora.errors import UserError
from swlora.runs import read_run


def test_resume(swlora, small, monkeypatch):
    assert "--resume needs the run's folder" in swlora("train", "--resume").mistake
    resumed = ["train", "--resume", "--output", "run"]
    assert "run holds no run to resume" in swlora(*resumed).mistake
    train = pipeline.train

    def interrupted(job):
        train(job)
        raise KeyboardInterrupt("stopped after step 2 of 2; --resume --output run continues")

    monkeypatch.setattr(pipeline, "train", interrupted)
    done = swlora("train", *small, "--output", "run")
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        "swlora: stopped after step 2 of 2; --resume --output run continues"
    )
    monkeypatch.setattr(pipeline, "train", train)
    assert "or continue it with --resume" in swlora("train", "--output", "run").mistake
    assert "keeps its --rank (it is 2); leave" in swlora(*resumed, "--rank", 5).mistake
    assert "leave out --config" in swlora(*resumed, "--config", "c.yaml").mistake
    mistake = swlora("train-eval", "--resume", "--output", "run").mistake
    assert mistake == "run holds a run of train, not of train-eval"
    done = swlora(*resumed)
    assert done.code == 0
    assert "resuming after step 2" in done.err
    assert "there is nothing to resume" in swlora(*resumed).mistake


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_time_is_recorded(number, swlora, small, monkeypatch):
    def interrupted(job):
        job.begin()
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr(pipeline, "train", interrupted)
    done = swlora("train", *small, "--output", "run")
    assert (done.code, done.err.splitlines()[-1]) == (130, "swlora: interrupted")
    assert read_run(Path("run"))["status"] == "cancelled"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_finaliser_swallows_is_recorded_too(number, swlora, small, monkeypatch):
    """Python only prints what __del__ raises; regex's parser has such objects."""

    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), number)

    def interrupted(job):
        job.begin()
        Finalised()  # gone at once
        time.sleep(20)
        raise RuntimeError("the signal was lost")

    before = sys.unraisablehook
    monkeypatch.setattr(pipeline, "train", interrupted)
    begun_s = time.monotonic()
    done = swlora("train", *small, "--output", "run")
    assert time.monotonic() - begun_s < 15  # a wait is ended
    assert (done.code, done.err.splitlines()[-1]) == (130, "swlora: interrupted")
    assert read_run(Path("run"))["status"] == "cancelled"
    assert sys.unraisablehook is before


def test_a_failure_is_one_line_too_and_exit_code_1(swlora, small, monkeypatch):
    def fails(job):
        job.begin()
        raise RuntimeError("the machine\n  is on fire")

    monkeypatch.setattr(pipeline, "train", fails)
    done = swlora("train", *small, "--output", "run")
    assert (done.code, done.out) == (1, "")
    expected = "swlora: RuntimeError: the machine is on fire (--debug shows where)"
    assert done.err.splitlines()[-1] == expected
    assert "Traceback" not in done.err
    assert read_run(Path("run"))["status"] == "failed"


def test_debug_shows_the_traceback(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="layer 7 does not exist"):
        main(
            [str(flag) for flag in ("train", *small, "--layers", "7", "--output", "run", "--debug")]
        )
    command = [sys.executable, "-m", "swlora", "train", "--rank", "0"]
    quiet, loud = (
        subprocess.run([*command, *more], capture_output=True, text=True)
        for more in ([], ["--debug"])
    )
    assert quiet.returncode == 2
    assert len(quiet.stderr.splitlines()) == 1
    assert "Traceback (most recent call last)" in loud.stderr
    assert "swlora.errors.UserError: --rank: must be " in loud.stderr
