"""How long work tells a person that it is alive, without knowing who listens.

Library code calls `progress.task(...)`; the command line passes an implementation that draws.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Move on by `amount`, with a short text such as the current loss."""


class Progress(Protocol):
    """Something that shows tasks."""

    @contextmanager
    def task(
        self, description: str, total: float | None = None, done: float = 0.0
    ) -> Iterator[Task]:
        """Show one task while the body runs; `total` None means unknown length.

        `done` of it was done before, such as by a training that goes on: it counts as a part of the
        whole, but says nothing of the pace.
        """
        ...

    def say(self, message: str) -> None:
        """Show one line that stays."""


class Silent:
    """Shows nothing; the default of library calls."""

    @contextmanager
    def task(
        self,
        description: str,  # noqa: ARG002
        total: float | None = None,  # noqa: ARG002
        done: float = 0.0,  # noqa: ARG002
    ) -> Iterator[Task]:
        """Run the body without showing anything."""
        yield self

    def say(self, message: str) -> None:
        """Show nothing."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Show nothing."""


def duration(seconds: float) -> str:
    """Write seconds for a person: 45 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
