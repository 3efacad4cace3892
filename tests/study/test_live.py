"""What a person sees: the state of every arm, and guesses of the time that is left."""

import io
import json
import time

import pytest
from rich.console import Console

from swlora.config import RunSpec
from swlora.progress import duration
from swlora.study import live
from swlora.study.live import Board, LineView, LiveView, make_view, snapshot, study_left
from swlora.study.plan import Task


def task(phase, arm, label, n_rows=0):
    return Task(phase, arm, label, f"{phase}/{arm}/{label}", RunSpec(), n_rows)


RATE = task("rates", "lora", "0.1", 50)
RUNS = [task("runs", arm, seed, 100) for seed in ("seed-0", "seed-1") for arm in ("lora", "super")]
BEAM = task("beam", "lora", "seed-0")


@pytest.fixture
def board():
    board = Board()
    board.plan([RATE, *RUNS, BEAM])
    return board


def line(step, **changes):
    values = {"step": step, "loss": 2.5, "rows": 8 * step, "examples_per_s": 4.0, "extra": 1}
    return json.dumps(values | changes) + "\n"


@pytest.fixture
def folder(tmp_path):
    """A study in whose second measured run ten steps are done."""
    run = tmp_path / RUNS[1].folder
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(line(step) for step in range(1, 11)))
    return tmp_path


# Where a run is


def test_the_last_step_of_a_run(folder):
    path = folder / RUNS[1].folder / "metrics.jsonl"
    now = snapshot(path.parent)
    assert (now.step, now.loss, now.rows, now.left_s(100)) == (10, 2.5, 80, 5.0)
    with path.open("a") as file:
        file.write('{"step": 11, "lo')  # caught while it is written
    assert snapshot(path.parent) == now
    path.write_text("x" * live.TAIL_BYTES + "\n" + line(12))
    assert snapshot(path.parent).step == 12


def test_before_the_first_step(tmp_path):
    assert snapshot(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("")
    assert snapshot(tmp_path) is None


# What is left


def test_time_is_guessed_from_what_is_done(board):
    assert board.left_s() == (0.0, False)
    board.end(RATE, "done", 25.0)
    # half a second a row from the short run; of beams nothing is known
    assert board.left_s() == (4 * 50.0, False)
    board.end(RUNS[0], "done", 80.0)
    assert board.left_s() == (3 * 80.0, False)
    board.end(RUNS[1], "done", 40.0)
    assert board.left_s() == (80.0 + 40.0, False)
    board.end(BEAM, "done", 7.0)
    assert board.left_s() == (120.0, True)
    assert study_left(board) == "study: 2 of 6 runs left, about 2 min"


def test_failed_runs_teach_nothing_and_are_over(board):
    board.end(RUNS[0], "failed", 1.0)
    assert board.left_s() == (0.0, False)
    assert study_left(board) == "study: 5 of 6 runs left, time unknown"


def test_the_present_run_counts_down(board, monkeypatch):
    board.end(RUNS[0], "done", 80.0)
    for other in (RATE, BEAM, *RUNS[2:]):
        board.end(other, "failed", None)
    board.start(RUNS[1])
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 30)
    left_s, complete = board.left_s()
    assert complete and left_s == pytest.approx(50, abs=1)
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 300)
    assert board.left_s() == (0.0, True)


def test_a_new_plan_keeps_what_is_known(board):
    board.end(RUNS[0], "done", 80.0)
    board.plan([RUNS[2]])
    assert study_left(board) == "study: 1 of 2 runs left, about 80 s"
    board.plan([])
    assert study_left(board) == "study: 0 of 1 run left, about 0 s"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (11_100, "3 h 5 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


# The two views


def test_the_table_shows_every_arm(board, folder):
    board.end(RATE, "done", 25.0)
    board.end(RUNS[0], "failed", 3.0)
    board.start(RUNS[1])
    console = Console(file=io.StringIO(), width=120)
    console.print(live.board_table(board, folder))
    title, _header, lora, found = console.file.getvalue().splitlines()
    assert title.startswith("study: 4 of 6 runs left, more than")
    assert lora.split() == ["lora", "1/4", "1", "failed"]
    assert found.split() == [
        *("super", "0/2", "runs", "seed-0", "step", "10", "(80%)", "2.500", "4.0/s", "5", "s")
    ]


def test_after_the_last_step_a_run_is_evaluated(board, folder):
    with (folder / RUNS[1].folder / "metrics.jsonl").open("a") as file:
        file.write(line(13, rows=100))
    cells = live.progress_cells(RUNS[1], snapshot(folder / RUNS[1].folder))
    assert cells == ("step 13 (100%)", "2.500", "4.0/s", "evaluating")


def test_lines_come_now_and_then(board, folder, monkeypatch):
    console = Console(file=io.StringIO(), width=120)
    view = LineView(console)
    board.start(RUNS[1])
    view.show(board, folder)
    assert console.file.getvalue() == ""
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + live.LINE_EVERY_S + 1)
    view.show(board, folder)
    view.show(board, folder)
    (said,) = console.file.getvalue().splitlines()
    assert said.startswith("super seed-0, step 10 (80%), 2.500, 4.0/s, 5 s, study: ")
    view.say("[done] in 3 s")
    assert console.file.getvalue().endswith("[done] in 3 s\n")


def test_a_terminal_gets_a_table(board, folder):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, highlight=False)
    view = LiveView(console)
    board.start(RUNS[1])
    view.show(board, folder)
    view.say("lora: layers [1]")
    view.close()
    assert "seed-0" in console.file.getvalue() and "lora: layers [1]" in console.file.getvalue()


def test_no_terminal_gets_lines():
    assert isinstance(make_view(), LineView)
