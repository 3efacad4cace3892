"""What a job writes down while it works: in a run folder (`runs.Run`), or in memory alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from swlora.config import RunSpec
from swlora.result_json import as_json
from swlora.run_settings import Change


class RunRecord(Protocol):
    """Takes down what a job does; `runs.Run` says more of each method.

    `folder` and `checkpoint` are None where nothing is written to disk. `facts` are what was
    recorded, by an earlier process too.
    """

    facts: dict[str, Any]

    @property
    def folder(self) -> Path | None:
        """The folder of the run, for what is too large to be a fact."""

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the newest snapshot of a training."""

    def begin(self, spec: RunSpec | None = None) -> None:
        """Note that the work begins, with the settings that it has."""

    def keep_place(self) -> bool:
        """Have a folder to write in, made again where it was removed.

        Says whether it was removed since this was last asked.
        """

    def changes_from(self, n_done: int) -> list[Change]:
        """Return the changes of settings so far, with those that hold from step `n_done` on."""

    def record(self, **facts: Any) -> None:
        """Add facts."""

    def record_source(self, **facts: Any) -> None:
        """Add what the run works on; UserError where it was something else before."""

    def add_timing(self, name: str, seconds: float) -> None:
        """Add `seconds` to the named share of the run's time."""

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Add the report of a training step."""

    def truncate_metrics(self, after_step: int) -> None:
        """Drop the reports of steps after `after_step`, which are done again."""

    def metrics(self) -> list[dict[str, Any]]:
        """Return the reports of all steps."""

    def sync(self) -> None:
        """Have the reports where a power cut does not lose them."""

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Add to what came out, under names such as "train" and "eval"."""

    def read_result(self) -> dict[str, Any]:
        """Return what came out so far, as JSON."""

    def note_end(self, error: BaseException) -> None:
        """Record an error that ends the process here and now, as the end of the work would."""


class MemoryRecord:
    """A record that leaves nothing on disk, and that nothing can be resumed from."""

    folder: Path | None = None
    checkpoint: Path | None = None

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.timings_s: dict[str, float] = {}
        self._metrics: list[dict[str, Any]] = []
        self._result: dict[str, Any] = {}

    def begin(self, spec: RunSpec | None = None) -> None:
        """Do nothing: there is no folder to make."""

    def keep_place(self) -> bool:
        """Do nothing: there is no folder to remove."""
        return False

    def changes_from(self, n_done: int) -> list[Change]:  # noqa: ARG002
        """Return none: there is nothing to go on from."""
        return []

    def record(self, **facts: Any) -> None:
        """Keep facts."""
        self.facts |= facts

    record_source = record  # no other process can have begun this run with another source

    def add_timing(self, name: str, seconds: float) -> None:
        """Add `seconds` to the named share of the time."""
        self.timings_s[name] = self.timings_s.get(name, 0.0) + seconds

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Keep the report of a training step."""
        self._metrics.append(dict(values))

    def truncate_metrics(self, after_step: int) -> None:
        """Drop the reports of steps after `after_step`."""
        self._metrics = [row for row in self._metrics if row["step"] <= after_step]

    def sync(self) -> None:
        """Do nothing: what is in memory is lost with the process."""

    def metrics(self) -> list[dict[str, Any]]:
        """Return the reports of all steps."""
        return list(self._metrics)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Keep what came out."""
        self._result |= as_json(result)

    def read_result(self) -> dict[str, Any]:
        """Return what came out so far."""
        return dict(self._result)

    def note_end(self, error: BaseException) -> None:
        """Do nothing: the record ends with the process."""


class DryRecord(MemoryRecord):
    """A record of work that is only looked at: it has the folder of a run, and writes nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.checkpoint = folder / "checkpoint"
