"""The pages of runs and studies: lists, curves, tables.

A page asks for its parts again while something is at work: `part` names one, `seen` is the version
that the page has.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from swlora.errors import UserError
from swlora.web.folders import FIGURE_TYPES, RunEntry, is_settled, run_figures
from swlora.web.page_api import FIGURE_POLICY
from swlora.web.pages import runs_view, study_view
from swlora.web.pages.render import READ, Name, fragment, live, page
from swlora.web.pages.training_view import RunWork, run_work
from swlora.web.problems import ApiError
from swlora.web.service import Service, service_of

router = APIRouter(include_in_schema=False)
Part = Annotated[str, Query(max_length=20)]
Seen = Annotated[str, Query(max_length=40)]
# The part of a run's page that says what is done in it; also of the page before its first step
WORK, BEGINNING = "work", "beginning"
All = Annotated[int, Query(alias="all", ge=0, le=1)]


@router.api_route("/runs", methods=READ)
def runs(request: Request, part: Part = "", seen: Seen = "", everything: All = 0) -> Response:
    """List studies and runs; those that never started only where everything is asked for."""
    service = service_of(request)
    studies = service.folders.studies()
    within = tuple(study.folder for study in studies.values())
    entries = service.folders.runs().values()
    alone = [e for e in entries if not any(e.folder.is_relative_to(folder) for folder in within)]
    found = runs_view.run_list(alone, shows_all=bool(everything))
    values: dict[str, Any] = {
        "runs": found.rows,
        "studies": study_view.study_rows(studies.values()),
        "n_older": found.n_older,
        "n_idle": found.n_idle,
        "unreadable": sorted({*service.folders.unreadable(), *found.unreadable}),
        "shows_all": bool(everything),
        "base_name": service.base_name,
    }
    if part:
        return fragment(seen, "part_runs.html", **values)
    shown = live("part_runs.html", **values)
    return page(request, "runs.html", list=shown, everything=everything)


@router.api_route("/runs/{name:path}", methods=READ)
def run(request: Request, name: str, part: Part = "", seen: Seen = "") -> Response:
    """Show a run; its curve grows while it trains."""
    service = service_of(request)
    entry = service.folders.runs().get(name)
    work = _work(service, name, entry)
    if entry is None and work is not None:
        return _run_that_begins(request, name, work, part, seen)
    has_ended = work is None or work.is_over
    if entry is not None and part in (WORK, BEGINNING):
        at_work = {"is_over": has_ended, "is_other_page": part == BEGINNING}
        return fragment(seen, "part_run_work.html", **at_work, name=name, work=work)
    try:
        if entry is None:
            raise UserError("no such run")
        folders = service.folders
        found = runs_view.run_view(entry, folders.adapters(), folders.not_served())
    except UserError as error:
        raise ApiError(404, "there is no such run here, or it cannot be read") from error
    is_over = found.row.status != "running" and has_ended and is_settled(entry)
    values: dict[str, Any] = {"run": found, "base_name": service.base_name}
    if part:
        return fragment(seen, _part("run", part), is_over=is_over, **values)
    return page(
        request,
        "run.html",
        run=found,
        is_over=is_over,
        curve=live("part_run_curve.html", **values),
        results=live("part_run_results.html", **values),
        name=name,
        work=work,
        work_part=live("part_run_work.html", name=name, work=work),
    )


def _run_that_begins(request: Request, name: str, work: RunWork, part: str, seen: str) -> Response:
    """Show a training that the page has started and that has no run folder yet."""
    values: dict[str, Any] = {"name": name, "work": work}
    if part:
        return fragment(seen, "part_run_work.html", is_over=work.is_over, **values)
    return page(request, "run_begins.html", part=live("part_run_work.html", **values), **values)


def _work(service: Service, name: str, entry: RunEntry | None) -> RunWork | None:
    """Return what the page does in a run, where this server may train."""
    if service.training is None:
        return None
    try:
        return run_work(service.training, name, entry)
    except UserError:  # it is just being removed
        return None


@router.api_route("/studies/{name:path}", methods=READ)
def study(request: Request, name: str, part: Part = "", seen: Seen = "") -> Response:
    """Show a study: where it stands, its tables and pictures."""
    service = service_of(request)
    entry = service.folders.studies().get(name)
    try:
        if entry is None:
            raise UserError("no such study")
        found = study_view.study_view(entry)
    except UserError as error:
        raise ApiError(404, "there is no such study here, or it cannot be read") from error
    at_work = service.folders.runs().get(found.current or "")
    try:
        current = runs_view.run_view(at_work) if at_work else None
    except UserError:
        current = None
    is_over = found.row.status != "running"
    values: dict[str, Any] = {
        "study": found,
        "current": current,
        "tables": study_view.study_tables(entry),
        "figures": study_view.study_figures(entry),
    }
    if part:
        return fragment(seen, _part("study", part), is_over=is_over, **values)
    return page(
        request,
        "study.html",
        study=found,
        is_over=is_over,
        board=live("part_study_board.html", **values),
        results=live("part_study_results.html", **values),
    )


@router.get("/study-figure")
def study_figure(request: Request, name: Name, file: Name) -> Response:
    """Send a picture that lies in a study's folder."""
    entry = service_of(request).folders.studies().get(name)
    path = run_figures(entry).get(file) if entry else None
    if path is None:
        raise ApiError(404, "there is no such figure")
    headers = {"content-security-policy": FIGURE_POLICY, "cache-control": "no-cache"}
    return FileResponse(path, media_type=FIGURE_TYPES[path.suffix], headers=headers)


def _part(kind: str, part: str) -> str:
    """Return the template of a part that a script asks for."""
    known = {"run": ("curve", "results"), "study": ("board", "results")}[kind]
    if part not in known:
        raise ApiError(404, "a page has no such part")
    return f"part_{kind}_{part}.html"
