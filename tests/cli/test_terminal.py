"""Progress: bars on a terminal, sparse lines elsewhere, nothing on stdout."""

import io
import re
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console
from rich.progress import Task as RichTask
from rich.text import Text

from swlora.cli import terminal
from swlora.cli.terminal import Bars, Lines, make_progress

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that a test sets: clock[0] is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def written(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_a_line_when_ten_seconds_are_over_and_ten_seconds_after_that(clock):
    console = Console(file=io.StringIO())
    with Lines(console).task("train", 40) as task:
        for second in range(0, 36, 3):
            clock[0] = second
            task.advance(1, f"loss {second}")
    assert written(console) == [
        "train: 5/40, 12 s gone, about 84 s left  loss 12",
        "train: 9/40, 24 s gone, about 83 s left  loss 24",
    ]


def test_what_was_done_before_says_nothing_of_the_pace(clock):
    console = Console(file=io.StringIO())
    with Lines(console).task("train", 1000, 900) as task:
        clock[0] = 20
        task.advance(0)  # nothing is known yet
        for _ in range(2):
            clock[0] += 10
            task.advance(10)
    assert written(console) == [
        "train: 910/1000, 30 s gone, about 4 min left",
        "train: 920/1000, 40 s gone, about 3 min left",
    ]


def test_a_task_of_unknown_length_and_one_that_stands_still(clock):
    console = Console(file=io.StringIO())
    for total, amount in ((None, 1), (40, 0)):
        with Lines(console).task("load", total) as task:
            clock[0] += 60
            task.advance(amount)
    assert written(console) == []


def test_bars_show_progress_and_notes():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    bars = Bars(console)
    with bars.task("train", 4) as task:
        for k in range(4):
            task.advance(1, f"loss {k}")
    with bars.task("load") as task:
        task.advance()
    bars.say("[done] as it is")
    output = console.file.getvalue()
    assert "4/4" in output
    assert "0 s gone" in output
    assert "loss 3" in output
    assert "load" in output
    assert "[done] as it is" in output  # no markup


def test_a_bar_of_what_goes_on_begins_where_it_stopped(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    seen: list[RichTask] = []
    monkeypatch.setattr(terminal._Times, "render", lambda _, task: seen.append(task) or Text())
    with Bars(console).task("train", 1000, 900) as task:
        for _ in range(3):
            time.sleep(0.02)
            task.advance(1)
        assert seen[-1].completed == 903
        assert 0 < (seen[-1].speed or 0.0) <= 50


def test_a_narrow_terminal_shows_counts_times_and_notes(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(RichTask, "elapsed", 12.0)
    monkeypatch.setattr(RichTask, "time_remaining", 30.0)
    note = "loss 0.523  held-out 1.234 (best 1.200)  17.0 examples/s"
    with Bars(console).task("train", 102) as task:
        task.advance(30, note)
        time.sleep(0.3)  # until it is drawn again
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert re.search(r"train \S+ +30/102 12 s gone, about 30 s left *\n", plain)
    assert f"\n  {note}" in plain


def test_a_task_within_another_one_has_a_bar_too():
    """As the trials of `--layers auto` are; rich refuses that before 14.1, which is not allowed."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    bars = Bars(console)
    with bars.task("measure the layers"), bars.task("try layers", 2) as task:
        task.advance(2)
    assert "2/2" in console.file.getvalue() and "measure" in console.file.getvalue()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (rich,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "rich")
    assert not rich.specifier.contains("14.0.0") and rich.specifier.contains("14.1.0")


def test_a_bar_does_not_hide_a_failure():
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(KeyboardInterrupt), Bars(console).task("train", 4):
        raise KeyboardInterrupt


def test_everything_goes_to_stderr(capsys):
    progress = make_progress()
    assert isinstance(progress, Lines)
    progress.say("x" * 300)
    assert capsys.readouterr() == ("", "x" * 300 + "\n")
