"""A run that several processes do together: the first one has its folder, the others its settings.

The first process reads, writes and prints as it does when it is alone; the others are told what
its run has of settings and facts, and have no folder.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from swlora.config import RunSpec
from swlora.processes import check_alike, check_peers, from_main, joined, last_words, world
from swlora.run_record import MemoryRecord, RunRecord
from swlora.versions import package_versions


class ToldRecord(MemoryRecord):
    """The record of a process beside the first: it knows what it was told, and writes nothing."""

    def __init__(self, facts: dict[str, Any], result: dict[str, Any]) -> None:
        super().__init__()
        self.facts, self._result = facts, result


@contextmanager
def joint_run(
    open_run: Callable[[], tuple[AbstractContextManager[RunRecord], RunSpec]],
    asked: Callable[[], Mapping[str, Any]],
    n_processes: int | None = None,
) -> Iterator[tuple[RunRecord, RunSpec]]:
    """Open a run in the first process, and give all what it works with: a record and the settings.

    `asked` says what this process was asked for, JSON's values by names, which must be the same in
    all; `n_processes` how many there are to be. Raises UserError where one differs, or another
    version of a package is installed there, and what `joined` and `start_group` raise.
    """
    with joined(n_processes):
        if not world().is_shared:
            opened, spec = open_run()
            with opened as run:
                yield run, spec
            return
        check_alike("settings", asked())
        check_alike("versions", package_versions())
        if world().is_main:
            opened, spec = open_run()
            with opened as run, last_words(run.note_end):
                settings = spec.model_dump(mode="json", exclude_unset=True)
                from_main(lambda: [settings, run.facts, run.read_result()])
                _start_group(spec)
                try:
                    yield run, spec
                except KeyboardInterrupt:
                    check_peers()  # the failure of another process may have interrupted this one
                    raise
        else:
            settings, facts, result = from_main(_only_the_first)
            spec = RunSpec.model_validate(settings)
            _start_group(spec)
            yield ToldRecord(facts, result), spec


def _start_group(spec: RunSpec) -> None:
    from swlora.processes.tensors import start_group

    start_group(spec.model.device)


def _only_the_first() -> Any:
    raise AssertionError("the first process alone opens the run")
