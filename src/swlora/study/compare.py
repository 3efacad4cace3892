"""Studies from a file to what they say: check all, run what is not done, publish.

Nothing trains before everything that can be known to fail was looked at. The same folder again goes
on where the study stopped. A file with several models is one study of each, in folders of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swlora.config.fields import split_list
from swlora.errors import RunFailedError, UserError
from swlora.study.arms import arms_of, select_arms
from swlora.study.check import Checked, check
from swlora.study.compared import Compared, ComparedModels
from swlora.study.folder import StudyFolder, check_folder, remove
from swlora.study.live import Board, View, make_view
from swlora.study.overview import Plans, plan_of
from swlora.study.phases import Phases
from swlora.study.runner import Command, Runner, child_command
from swlora.study.study_file import read_studies


@dataclass(frozen=True)
class Request:
    """What is asked for: a study file, the folder of its results, arms to run (None: all), and
    dotted settings that win over the file."""

    path: Path
    output: Path
    only: list[str] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def plan(request: Request) -> Plans:
    """Return what the studies of a file would do; nothing runs, no file is made.

    Raises UserError with all problems of the file; what is not at hand is said in the plan.
    """
    studies = checked_studies(request, dry_run=True)
    plans = [plan_of(n, checked, wanted_arms(checked, request)) for n, checked, _ in studies]
    return Plans(plans)


def compare(
    request: Request, view: View | None = None, command: Command = child_command
) -> Compared | ComparedModels:
    """Run or continue the studies of a file; return what came out: that of several by folder.

    Raises UserError with all problems before anything runs, and RunFailedError at the end where
    runs failed; what could be measured is published all the same.
    """
    results: dict[str, Compared] = {}
    failures: list[str] = []
    view = view or make_view()
    try:
        studies = checked_studies(request, dry_run=False)
        wanted = [wanted_arms(checked, request) for _, checked, _ in studies]
        for (name, checked, folder), names in zip(studies, wanted, strict=True):
            results[str(folder)], lines = run_study(name, checked, folder, names, view, command)
            failures += lines
    except KeyboardInterrupt as error:
        stopped = "the study was stopped; the same command goes on where it is"
        raise KeyboardInterrupt(stopped) from error
    finally:
        view.close()
    if failures:
        more = f" and {len(failures) - 4} more" if len(failures) > 4 else ""
        raise RunFailedError(
            f"not done: {'; '.join(failures[:4])}{more}; the same command tries them again, and "
            f"results.md in {', '.join(results)} has what is done"
        )
    return next(iter(results.values())) if len(results) == 1 else ComparedModels(results)


def checked_studies(request: Request, *, dry_run: bool) -> list[tuple[str, Checked, Path]]:
    """Read and check a study file; (name, what it works on, folder) for each of its models.

    Raises UserError with all problems of the file. What is not at hand is a problem too, unless
    this is a dry run.
    """
    problems: list[str] = []
    studies: list[tuple[str, Checked, Path]] = []
    files = read_studies(request.path, request.overrides)
    for file in files:
        found = list(file.problems)
        if file.spec is not None:
            folder = request.output if len(files) == 1 else request.output / file.name
            checked = check(file.spec, may_fetch=not dry_run)
            studies.append((file.name, checked, folder))
            found += checked.problems
            found += [] if dry_run else [f"not at hand: {r}" for r in checked.unchecked]
        problems += [line if len(files) == 1 else f"{file.name}: {line}" for line in found]
    if problems:
        raise UserError(f"in {request.path}: {'; '.join(dict.fromkeys(problems))}")
    for _, checked, folder in studies:
        check_folder(folder, checked.spec)
    return studies


def wanted_arms(checked: Checked, request: Request) -> list[str]:
    """Return the names of the arms that run: those that were named, or all, with controls."""
    arms, only = arms_of(checked.spec, checked.n_layers), split_list(request.only or [])
    assert isinstance(only, list)
    return select_arms(arms, checked.spec, only)


def run_study(
    name: str,
    checked: Checked,
    path: Path,
    wanted: list[str],
    view: View,
    command: Command = child_command,
) -> tuple[Compared, list[str]]:
    """Run or continue one study in `path`; return (what came out, what is not done and why)."""
    from swlora.study.results import publish

    with StudyFolder(path, name, checked.spec) as study:
        if checked.spec.model.dtype == "auto":  # a probe by stopwatch: asked once for all runs
            checked.facts["dtype"] = study.facts.get("dtype", checked.facts["dtype"])
        study.record_source(**checked.identity)
        study.record(**checked.facts, n_rows=checked.n_rows)
        board = Board()
        runner = Runner(study, board, view, command)
        phases = Phases(checked.resolved(), study, runner, board, view, wanted)
        phases.run()
        remove(study.caches)
        unfinished = phases.unfinished()
        study.record(status="done" if phases.is_complete() else "incomplete")
        return publish(path), unfinished
