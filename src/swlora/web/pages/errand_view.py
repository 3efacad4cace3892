"""What became of an errand, as the page shows it."""

from dataclasses import dataclass
from typing import Any

from swlora.web.folders import without_folders
from swlora.web.training import wanted
from swlora.web.training.errands import Errand


@dataclass(frozen=True)
class ErrandView:
    """An errand: running, done, failed or ("") not asked for; what is wrong, where something is."""

    state: str
    problem: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.state != "running"


def outcome(errand: Errand | None) -> tuple[str, str, dict[str, Any] | None]:
    """Return (state, problem, result) of an errand; a result only of one that is done."""
    if errand is None:
        return "", "", None
    if not errand.is_over:
        return "running", "", None
    if errand.result is None:
        return "failed", as_on_page(errand.problem), None
    return "done", "", errand.result


def as_on_page(message: str) -> str:
    """Return a child's message without folders, with settings called as they are on the page."""
    return wanted.with_labels(without_folders(message))
