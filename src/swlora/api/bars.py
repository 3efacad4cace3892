"""Progress for people who work in Python: bars of tqdm, in a notebook by themselves."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from swlora.errors import UserError
from swlora.progress import Progress, Silent, Task


def shown(progress: "Progress | bool | None") -> Progress:
    """Return what shows progress: `progress` itself, bars for True, nothing for False.

    None is bars in a notebook, and nothing elsewhere.
    """
    if progress is None:
        progress = in_notebook()
    if isinstance(progress, bool):
        return Bars() if progress else Silent()
    if not (hasattr(progress, "task") and hasattr(progress, "say")):
        raise UserError(
            f"progress is True, False or a swlora.progress.Progress, not {type(progress).__name__}"
        )
    return progress


def in_notebook() -> bool:
    """Say whether a kernel of Jupyter or the like runs this program."""
    ipython = sys.modules.get("IPython")  # loaded long before, where that is so
    shell = ipython.get_ipython() if ipython else None
    return "IPKernelApp" in getattr(shell, "config", {})


class Bars:
    """A bar for every task: a widget where the notebook can show one, else a line of text."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about widgets that are not installed
            from tqdm.auto import tqdm
        self._tqdm: Any = tqdm

    def say(self, message: str) -> None:
        """Print one line that stays."""
        self._tqdm.write(message)

    @contextmanager
    def task(
        self, description: str, total: float | None = None, done: float = 0.0
    ) -> Iterator[Task]:
        """Show a bar while the body runs; where the length is unknown, one that goes afterwards."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            look: dict[str, Any] = {"leave": total is not None, "initial": _whole(done)}
            if total is None:
                look["bar_format"] = "{desc} ({elapsed})"
            bar = self._tqdm(desc=description, total=total, **look)
        with bar:
            yield _Bar(bar)


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Move on; the note stands behind the bar."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(_whole(amount))


def _whole(amount: float) -> float:
    """Return a whole amount without a decimal point, which tqdm would show."""
    return int(amount) if amount == int(amount) else amount
