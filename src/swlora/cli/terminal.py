"""What a person sees while work goes on: bars on a terminal, a line now and then elsewhere.

Everything here goes to stderr; results go to stdout.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichBars
from rich.progress import Task as RichTask
from rich.text import Text

from swlora.progress import Progress, Task, duration

LINE_EVERY_S = 10.0


def make_progress() -> Progress:
    """Return bars where stderr is a terminal, else plain lines."""
    console = Console(stderr=True, highlight=False)
    return Bars(console) if console.is_terminal else Lines(console)


def times(gone_s: float, left_s: float | None) -> str:
    """Say how long work has taken and will take, where that is known."""
    left = "" if left_s is None else f", about {duration(left_s)} left"
    return f"{duration(gone_s)} gone{left}"


class _Times(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: RichTask) -> Text:
        return Text(times(task.elapsed or 0.0, None if task.finished else task.time_remaining))


class _BarsAndNotes(RichBars):
    """Bars with a task's note on a line of its own: beside them it would push the times away."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")


class Bars:
    """A live bar for every task."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, message: str) -> None:
        """Print one line above the bars."""
        self._console.print(message, markup=False)

    @contextmanager
    def task(
        self, description: str, total: float | None = None, done: float = 0.0
    ) -> Iterator[Task]:
        """Show a bar (or a spinner, where the length is unknown) while the body runs."""
        columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(bar_width=20), MofNCompleteColumn()]
        columns.append(_Times())
        with _BarsAndNotes(*columns, console=self._console, transient=False) as bars:
            task_id = bars.add_task(description, total=total, completed=int(done), note="")

            class _Bar:
                def advance(self, amount: float = 1.0, note: str = "") -> None:
                    bars.update(task_id, advance=amount)
                    if note:
                        bars.update(task_id, note=note)

            yield _Bar()
            bars.update(
                task_id, total=bars.tasks[0].completed or 1, completed=bars.tasks[0].completed or 1
            )


class Lines:
    """A line when a task has run for a while, and every ten seconds after that."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, message: str) -> None:
        """Print one line."""
        self._console.print(message, markup=False, soft_wrap=True)

    @contextmanager
    def task(
        self, description: str, total: float | None = None, done: float = 0.0
    ) -> Iterator[Task]:
        """Report on the body's work as it goes on."""
        yield _LineTask(self, description, total, done)


class _LineTask:
    def __init__(
        self, lines: Lines, description: str, total: float | None, done_before: float
    ) -> None:
        self._lines, self._description, self._total = lines, description, total
        self._done = self._done_before = done_before
        self._start_s = self._shown_s = time.monotonic()

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Move on; print where the last line is old enough."""
        self._done += amount
        now_s = time.monotonic()
        done_here = self._done - self._done_before  # in the time since the start
        if now_s - self._shown_s < LINE_EVERY_S or not self._total or not done_here:
            return
        self._shown_s = now_s
        gone_s = now_s - self._start_s
        left_s = gone_s * (self._total - self._done) / done_here
        self._lines.say(
            f"{self._description}: {self._done:.0f}/{self._total:.0f}, "
            f"{times(gone_s, left_s)}  {note}".rstrip()
        )
