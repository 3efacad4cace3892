"""Studies from a file to what they say: check all, run what is not done, publish.

Nothing trains before everything that can be known to fail was looked at. The same folder again goes
on where the study stopped. A file with several models is one study of each, in folders of its own.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.config.fields import split_list
from swlora.errors import RunFailedError, UserError
from swlora.study.arms import arms_of, select_arms
from swlora.study.check import Checked, check
from swlora.study.compared import Compared, ComparedModels
from swlora.study.folder import StudyFolder, check_folder, remove
from swlora.study.live import Board, View, make_view
from swlora.study.one_process import Command, child_command
from swlora.study.overview import Plans, plan_of
from swlora.study.phases import Phases
from swlora.study.runner import Runner
from swlora.study.study_file import read_studies

if TYPE_CHECKING:
    from swlora.study.ray_runner import Cluster


@dataclass(frozen=True)
class Request:
    """What is asked for: a study file, the folder of its results, arms to run (None: all), and
    dotted settings that win over the file; where the runs are made, unless it is here."""

    path: Path
    output: Path
    only: list[str] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    ray: "RayAddress | None" = None


@dataclass(frozen=True)
class RayAddress:
    """A Ray cluster, and how many of its CPUs each run gets; None: those of a machine."""

    address: str
    n_cpus: int | None = None


class NotDoneError(RunFailedError):
    """Runs of a study failed; the others were made. `not_done` says which and why, in short.

    `compared` holds what came out all the same, as `compare` returns it.
    """

    def __init__(self, not_done: str, where: str, compared: Compared | ComparedModels) -> None:
        super().__init__(f"not done: {not_done}; {where}")
        self.not_done, self.compared = not_done, compared


@contextmanager
def cluster_of(request: Request, device: str, view: View) -> Iterator["Cluster | None"]:
    """Connect to the cluster of a request, if there is one, and say what runs where."""
    if request.ray is None:
        yield None
        return
    from swlora.study.ray_cluster import connect

    wants_gpu = None if device == "auto" else device.startswith("cuda")
    cluster = connect(request.ray.address, request.ray.n_cpus, wants_gpu=wants_gpu)
    try:
        view.say(cluster.describe())
        yield cluster
    finally:
        cluster.close()


def plan(request: Request) -> Plans:
    """Return what the studies of a file would do; nothing runs, no file is made.

    Raises UserError with all problems of the file; what is not at hand is said in the plan.
    """
    studies = checked_studies(request, dry_run=True)
    plans = [plan_of(n, checked, wanted_arms(checked, request)) for n, checked, _ in studies]
    if request.ray is not None:
        view = make_view()
        with closing(view), cluster_of(request, studies[0][1].spec.model.device, view):
            pass
    return Plans(plans)


def compare(
    request: Request,
    view: View | None = None,
    command: Command = child_command,
) -> Compared | ComparedModels:
    """Run or continue the studies of a file; return what came out: that of several by folder.

    Raises UserError with all problems before anything runs, and NotDoneError at the end where
    runs failed; what could be measured is published all the same, also after an interruption.
    """
    results: dict[str, Compared] = {}
    failures: list[str] = []
    view = view or make_view()
    try:
        studies = checked_studies(request, dry_run=False)
        wanted = [wanted_arms(checked, request) for _, checked, _ in studies]
        device = studies[0][1].spec.model.device
        with cluster_of(request, device, view) as cluster:
            for (name, checked, folder), names in zip(studies, wanted, strict=True):
                result, lines = run_study(name, checked, folder, names, view, command, cluster)
                results[str(folder)] = result
                failures += lines
    except KeyboardInterrupt as error:
        stopped = "the study was stopped; the same command goes on where it is"
        raise KeyboardInterrupt(stopped) from error
    finally:
        view.close()
    compared = next(iter(results.values())) if len(results) == 1 else ComparedModels(results)
    if failures:
        more = f" and {len(failures) - 4} more" if len(failures) > 4 else ""
        again = "the same command tries again what may end otherwise, and results.md in"
        where = f"{again} {', '.join(results)} has what is done"
        raise NotDoneError(f"{'; '.join(failures[:4])}{more}", where, compared)
    return compared


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
    cluster: "Cluster | None" = None,
) -> tuple[Compared, list[str]]:
    """Run or continue one study in `path`; return (what came out, what is not done and why)."""
    from swlora.study.results import publish

    with StudyFolder(path, name, checked.spec) as study:
        if checked.spec.model.dtype == "auto":  # a probe by stopwatch: asked once for all runs
            checked.facts["dtype"] = study.facts.get("dtype", checked.facts["dtype"])
        study.record_source(**checked.identity)
        study.record(**checked.facts, n_rows=checked.n_rows)
        board = Board()
        resolved = checked.resolved()
        runner = _runner(resolved, study, board, view, command, cluster)
        phases = Phases(resolved, study, runner, board, view, wanted)
        try:
            phases.run()
        except KeyboardInterrupt:
            study.record(status="cancelled")
            view.say("writing what is done so far (again: not)")
            publish(path)
            raise
        finally:
            runner.close()
        remove(study.caches)
        unfinished = phases.unfinished()
        study.record(status="done" if phases.is_complete() else "incomplete")
        return publish(path), unfinished


def _runner(
    checked: Checked,
    study: StudyFolder,
    board: Board,
    view: View,
    command: Command,
    cluster: "Cluster | None",
) -> Runner:
    """Return what makes the runs: one after another here, or on a cluster."""
    if cluster is None:
        return Runner(study, board, view, command)
    from swlora.study.ray_runner import RayRunner

    return RayRunner(checked.spec, study, board, view, cluster)
