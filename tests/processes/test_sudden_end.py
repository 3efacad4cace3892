"""A process that hangs when another one failed is ended, and its run says so."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from swlora import joint_run as joint_run_module
from swlora.config import RunSpec
from swlora.joint_run import joint_run
from swlora.processes import joining, last_words
from swlora.processes.peers import Failure
from swlora.processes.world import World
from swlora.runs import Run, read_run


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those of the first of two processes, of which the other one was killed."""
    monkeypatch.setattr(joining, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(joining, "ENDED_S", 0.01)
    gone = Failure(1, 0, "rank 1 is gone")
    known = SimpleNamespace(world=World(0, 2), failure=gone, is_noticed=True)
    monkeypatch.setattr(joining._state, "peers", known)
    return known


def test_its_run_has_failed(peers, tmp_path, monkeypatch, capsys) -> None:
    folder, seen = tmp_path / "run", []
    monkeypatch.setattr(joining.os, "_exit", lambda code: seen.append((code, read_run(folder))))
    with Run.create(folder, RunSpec(), "train") as run:
        with last_words(run.note_end):
            joining._end_what_hangs(peers)
        assert joining._state.last_words is None
    ((code, facts),) = seen
    assert (code, facts["status"]) == (1, "failed")
    assert facts["reason"] == "RunFailedError: rank 1 is gone"
    assert facts["error"] == {"code": "failed", "message": "rank 1 is gone"}
    assert capsys.readouterr().err == "swlora: rank 1 is gone\n"


def test_a_disk_that_hangs_does_not_keep_it(peers, monkeypatch) -> None:
    codes, never = list[int](), threading.Event()
    monkeypatch.setattr(joining.os, "_exit", codes.append)
    monkeypatch.setattr(joining, "LAST_WORDS_S", 0.01)
    with last_words(lambda _: never.wait() and None):
        joining._end_what_hangs(peers)
    never.set()
    assert codes == [1]


def test_the_first_process_of_a_run_has_its_last_words(tmp_path, monkeypatch) -> None:
    for name, stand_in in (
        ("joined", lambda _: nullcontext()),
        ("world", lambda: World(0, 2)),
        ("check_alike", lambda *_: None),
        ("from_main", lambda make: make()),
        ("_start_group", lambda _: None),
    ):
        monkeypatch.setattr(joint_run_module, name, stand_in)

    def opened() -> Any:
        return Run.prepare(tmp_path / "run", RunSpec(), "train"), RunSpec()

    with joint_run(opened, dict) as (run, _):
        assert joining._state.last_words == run.note_end
        run.note_end(KeyboardInterrupt())
        assert not (tmp_path / "run").exists()  # it has not begun
        run.begin()
        run.note_end(KeyboardInterrupt())
        assert read_run(tmp_path / "run")["status"] == "cancelled"
    assert joining._state.last_words is None
