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
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Show one task while the body runs; `total` None means unknown length."""
        ...

    def say(self, message: str) -> None:
        """Show one line that stays."""


class Silent:
    """Shows nothing; the default of library calls."""

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:  # noqa: ARG002
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
