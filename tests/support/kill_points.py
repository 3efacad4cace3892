"""Every point between two file operations of a training, and what becomes of the run from there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fault_trials import Outcome, go_on, summary, train_in
from tests.support.recorded_files import Left, recorded

from swlora.config import load_spec


@dataclass(frozen=True)
class KillPoints:
    """What was looked at: points, ways in which each may leave the folder, and what went wrong."""

    n_points: int
    n_left: int
    n_distinct: int
    failures: list[str]


def check_kill_points(settings: Mapping[str, Any], folder: Path) -> KillPoints:
    """Train in `folder`, and go on from everything that a kill or a power cut may leave on the way.

    What differs by the clock alone is gone on from once.
    """
    spec = load_spec(None, dict(settings))
    (folder / "recorded").mkdir()
    with recorded(folder / "recorded") as record:
        train_in(folder / "recorded" / "run", spec)
    expected = Outcome.of(folder / "recorded" / "run")
    distinct: dict[frozenset[tuple[str, str]], Left] = {}
    for left in record.left:
        distinct.setdefault(summary(left.files), left)
    failures = []
    for number, left in enumerate(distinct.values()):
        place = folder / f"left-{number}"
        left.write(place)
        try:
            go_on(place / "run", spec)
            difference = expected.difference(place / "run")
        except Exception as error:
            difference = f"{type(error).__name__}: {error}"
        if difference:
            failures.append(f"{left.way}, {left.point}: {difference}")
    return KillPoints(record.n_points, len(record.left), len(distinct), failures)
