"""What a person sees of a study: where it stands, read from the folders of its runs.

A board knows the runs and what became of them; a live table shows it on a terminal, lines show it
elsewhere. Times to come are guessed from runs that are done: of the same arm, else of the same
phase, else (for measured runs) from the short runs' seconds a row.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from swlora.bounded_read import UnreadableError, parse_json, read_tail
from swlora.metrics_file import METRICS
from swlora.plural import counted
from swlora.progress import duration
from swlora.study.plan import Task

LINE_EVERY_S = 30.0
TAIL_BYTES = 8192
OPEN = (None, "running")  # states of runs that are not over


@dataclass
class Board:
    """All runs of a study and what became of them, by folder."""

    tasks: dict[str, Task] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)  # since when, in monotonic seconds
    n_at_once: int = 1  # runs, as far as is known

    def plan(self, tasks: list[Task]) -> None:
        """Replace the runs that are to come; those that are over stay, with what became of them."""
        over = {f: task for f, task in self.tasks.items() if self.status.get(f) not in OPEN}
        self.tasks = over | {task.folder: task for task in tasks}

    def start(self, task: Task) -> None:
        """Note that a run begins."""
        self.tasks[task.folder] = task
        self.status[task.folder] = "running"
        self.running[task.folder] = time.monotonic()

    def wait(self, task: Task) -> None:
        """Note that a run is to begin again."""
        self.running.pop(task.folder, None)
        self.status.pop(task.folder, None)

    def end(self, task: Task, status: str, seconds: float | None) -> None:
        """Note what became of a run."""
        self.tasks[task.folder] = task
        self.status[task.folder] = status
        if seconds is not None and status == "done":
            self.seconds[task.folder] = seconds
        self.running.pop(task.folder, None)

    def left_s(self) -> tuple[float, bool]:
        """Return (guessed seconds to the end of the study, whether every run could be guessed)."""
        total_s, complete, now_s = 0.0, True, time.monotonic()
        for folder, task in self.tasks.items():
            if self.status.get(folder) not in OPEN:
                continue
            guess_s = self._guess_s(task)
            complete = complete and guess_s is not None
            done_s = now_s - self.running.get(folder, now_s)
            total_s += max(0.0, (guess_s or 0.0) - done_s)
        return total_s / self.n_at_once, complete

    def _guess_s(self, task: Task) -> float | None:
        done = [(self.tasks[folder], s) for folder, s in self.seconds.items()]
        phase = [(other, s) for other, s in done if other.phase == task.phase]
        for pool in ([s for other, s in phase if other.arm == task.arm], [s for _, s in phase]):
            if pool:
                return sum(pool) / len(pool)
        short = [(other.n_rows, s) for other, s in done if other.phase == "rates" and other.n_rows]
        if task.phase != "runs" or not short:
            return None
        return task.n_rows * sum(s for _, s in short) / sum(n for n, _ in short)


@dataclass(frozen=True)
class Snapshot:
    """How far a run is: the last line of its metrics, and the training time left."""

    step: int
    loss: float
    rows: int
    examples_per_s: float

    def left_s(self, n_rows: int) -> float:
        """Return the seconds of training that are left at the present rate."""
        return max(0, n_rows - self.rows) / self.examples_per_s


def snapshot(folder: Path) -> Snapshot | None:
    """Read the last training step that a run folder tells of; None before the first."""
    try:
        lines = read_tail(folder / METRICS, TAIL_BYTES).splitlines()
    except UnreadableError:
        return None
    for line in reversed(lines):
        try:
            row = parse_json(line)
            return Snapshot(row["step"], row["loss"], row["rows"], row["examples_per_s"])
        except (ValueError, TypeError, KeyError):  # torn, or of another kind than a step
            continue
    return None


class View(Protocol):
    """Something that shows a board."""

    def say(self, message: str) -> None:
        """Show one line that stays."""

    def show(self, board: Board, folder: Path) -> None:
        """Show where the study stands; called every half second. `folder` is the study's."""

    def close(self) -> None:
        """Stop showing."""


def make_view() -> View:
    """Return a live table where stderr is a terminal, else plain lines."""
    console = Console(stderr=True, highlight=False)
    return LiveView(console) if console.is_terminal else LineView(console)


class LineView:
    """A line every half minute."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_s = time.monotonic()

    def say(self, message: str) -> None:
        """Print one line."""
        self._console.print(message, markup=False, soft_wrap=True)

    def show(self, board: Board, folder: Path) -> None:
        """Print how far the present runs are, where the last line is old enough."""
        if not board.running or time.monotonic() - self._shown_s < LINE_EVERY_S:
            return
        self._shown_s = time.monotonic()
        for folder_of_run in board.running:
            task = board.tasks[folder_of_run]
            cells = progress_cells(task, snapshot(folder / task.folder))
            left = [] if len(board.running) > 1 else [study_left(board)]
            self.say(", ".join([f"{task.arm} {task.label}", *(c for c in cells if c), *left]))
        if len(board.running) > 1:
            self.say(study_left(board))

    def close(self) -> None:
        """Nothing to stop."""


class LiveView:
    """A table of all arms, drawn over and over."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    def say(self, message: str) -> None:
        """Print one line above the table."""
        self._live.console.print(message, markup=False)

    def show(self, board: Board, folder: Path) -> None:
        """Draw the table anew."""
        self._live.update(board_table(board, folder), refresh=True)

    def close(self) -> None:
        """Take the table away."""
        self._live.stop()


def board_table(board: Board, folder: Path) -> Table:
    """Return the live table: an arm a line, with what it is at."""
    table = Table(title=study_left(board), title_justify="left", box=None, pad_edge=False)
    for name in ("arm", "done", "now", "step", "loss", "examples/s", "ETA"):
        table.add_column(name, justify="left" if name in ("arm", "now") else "right")
    for arm in dict.fromkeys(task.arm for task in board.tasks.values()):
        tasks = [task for task in board.tasks.values() if task.arm == arm]
        states = [board.status.get(task.folder, "waiting") for task in tasks]
        n_done = states.count("done")
        now, cells = _summary(states), ("", "", "", "")
        running = [board.tasks[place] for place in board.running if board.tasks[place].arm == arm]
        if running:
            task, *others = running
            now = f"{task.phase} {task.label}" + (f" +{len(others)}" if others else "")
            cells = progress_cells(task, snapshot(folder / task.folder))
        table.add_row(arm, f"{n_done}/{len(tasks)}", now, *cells)
    return table


def progress_cells(task: Task, now: Snapshot | None) -> tuple[str, str, str, str]:
    """Return a run's step, loss, examples/s and time left, each with its name; "" if unknown."""
    if now is None or task.n_rows == 0:
        return ("", "", "", "")
    is_training = now.rows < task.n_rows
    left = duration(now.left_s(task.n_rows)) if is_training else "evaluating"
    share = f"{min(1.0, now.rows / task.n_rows):.0%}"
    return (f"step {now.step} ({share})", f"{now.loss:.3f}", f"{now.examples_per_s:.1f}/s", left)


def study_left(board: Board) -> str:
    """Say how long the study will still take, as far as that can be guessed."""
    seconds, complete = board.left_s()
    n_left = sum(board.status.get(folder) in OPEN for folder in board.tasks)
    left = f"{'about' if complete else 'more than'} {duration(seconds)}"
    if not (seconds or complete):
        left = "time unknown"
    return f"study: {n_left} of {counted(len(board.tasks), 'run')} left, {left}"


def _summary(states: list[str]) -> str:
    """Say what became of an arm's runs, the worst first."""
    counts: dict[str, Any] = {state: states.count(state) for state in states}
    for state in ("failed", "cancelled"):
        if state in counts:
            return f"{counts[state]} {state}"
    return "done" if set(states) == {"done"} else "waiting"
