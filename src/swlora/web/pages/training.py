"""The pages that train: choose data, look at them, set up, start; and the buttons of a run.

Nothing here computes or waits for a child: the server's texts go on.
"""

import asyncio
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, RedirectResponse, Response

from swlora.bounded_read import UnreadableError
from swlora.errors import UserError
from swlora.web.folders import without_folders
from swlora.web.packed_folder import PackedFolder
from swlora.web.page_api import find_run
from swlora.web.pages import training_view
from swlora.web.pages.estimate_view import EstimateView, estimate_view
from swlora.web.pages.forms import Filled, read_form
from swlora.web.pages.render import READ, Name, fragment, live, page
from swlora.web.problems import ApiError
from swlora.web.service import Service, service_of
from swlora.web.training import wanted
from swlora.web.training.data_folder import DataFile
from swlora.web.training.desk import TrainingDesk
from swlora.web.training.made_files import GGUF_TYPES, gguf_path, gguf_state

OFF = (
    "training is off on this server: it starts with --allow-training, and --data-folder for the "
    "folder of the data"
)
CONFLICT = 409
_ACTIONS = ("stop", "kill", "resume", "merge", "export")
Short = Annotated[str, Query(max_length=40)]
Columns = Annotated[str, Query(max_length=wanted.MAX_CHARACTERS)]

router = APIRouter(prefix="/train", include_in_schema=False)


# Choosing and looking


@router.api_route("", methods=READ)
def choose(request: Request) -> Response:
    """List the data, and say what is at work."""
    desk = _desk(service_of(request))
    files = desk.data.files()
    rows = training_view.data_rows(list(files.values()))
    return page(
        request, "train.html", data=rows, is_whole=desk.data.is_whole, job=desk.worker.now()
    )


@router.post("/look")
async def look(request: Request) -> Response:
    """Start a look at data, and lead to where it is shown."""
    filled = Filled({"data": "", "columns": ""})
    await read_form(request, filled)
    values = filled.values

    def begin() -> None:
        desk = _desk(service_of(request))
        desk.look(_file(desk, values["data"]), values)

    try:
        await asyncio.to_thread(begin)
    except UserError as error:
        raise ApiError(400, without_folders(str(error))) from error
    given = {name: values[name] for name in ("data", "columns") if values[name]}
    return _to(f"/train/with?{urlencode(given)}")


@router.api_route("/with", methods=READ)
def with_data(
    request: Request, data: Name = "", columns: Columns = "", part: Short = "", seen: Short = ""
) -> Response:
    """Show data, and the form that starts a training on them."""
    desk = _desk(service_of(request))
    file, values = _file(desk, data), {"columns": columns}
    if part:
        found = _look(desk, file, values)
        shown = _shown(file, values, found)
        return fragment(seen, "part_train_look.html", is_over=found.is_over, **shown)
    service = service_of(request)
    taken = {*service.folders.runs(), service.base_name}
    filled = Filled(wanted.defaults() | values | {"name": wanted.free_name(file, taken)})
    return _form_page(request, file, filled)


@router.api_route("/estimate", methods=READ)
def estimate(request: Request, key: Short = "", seen: Short = "") -> Response:
    """Say what became of an estimate, for the page that asked for it."""
    found = estimate_view(_desk(service_of(request)).errands.of(key))
    if not found.state:
        found = EstimateView(
            "failed", "it is not known any more, such as after a restart; ask again"
        )
    return fragment(seen, "part_train_estimate.html", is_over=found.is_over, estimate=found)


@router.post("/start")
async def start(request: Request) -> Response:
    """Start a training and lead to its run; show the form again where it cannot begin."""
    filled = Filled(wanted.defaults() | {"data": ""})
    await read_form(request, filled)
    return await asyncio.to_thread(_started, request, filled)


def _started(request: Request, filled: Filled) -> Response:
    desk = _desk(service_of(request))
    file = _file(desk, filled.values["data"])
    try:
        if filled.values.get("action") == "estimate":
            return _form_page(request, file, filled, desk.estimate(file, filled.values))
        return _to(_run_url(desk.start(file, filled.values)))
    except UserError as error:
        filled.refuse(ApiError(400, without_folders(str(error))))
        return _form_page(request, file, filled)


def _form_page(
    request: Request, file: DataFile, filled: Filled, estimate_key: str = ""
) -> Response:
    desk = _desk(service_of(request))
    found = _look(desk, file, filled.values)
    estimate = estimate_view(desk.errands.of(estimate_key))
    return page(
        request,
        "train_with.html",
        filled.status,
        form=filled,
        file=file,
        look=found,
        part=live("part_train_look.html", **_shown(file, filled.values, found)),
        part_url=urlencode({"data": file.name, "columns": filled.values["columns"]}),
        estimate=estimate,
        estimate_part=live("part_train_estimate.html", estimate=estimate),
        estimate_key=estimate_key,
        methods=wanted.METHODS,
        layers=wanted.LAYERS,
        job=desk.worker.now(),
    )


def _shown(file: DataFile, values: dict[str, str], found: training_view.Look) -> dict[str, Any]:
    """Return what the template of a look at data is filled with."""
    shown_text = training_view.shown_text
    return {"file": file, "columns": values["columns"], "look": found, "shown_text": shown_text}


def _look(desk: TrainingDesk, file: DataFile, values: dict[str, str]) -> training_view.Look:
    try:
        return training_view.look_view(desk.look_of(file, values))
    except UserError as error:
        return training_view.Look("failed", without_folders(str(error)))


# The buttons of a run


@router.post("/{action}")
async def of_run(request: Request, action: str) -> Response:
    """Do what a button of a run says, and lead back to the run."""
    if action not in _ACTIONS:
        raise ApiError(404, "there is no such page")
    filled = Filled({"run": "", "type": ""})
    await read_form(request, filled)
    await asyncio.to_thread(_act, service_of(request), action, filled.values)
    return _to(_run_url(filled.values["run"]))


def _act(service: Service, action: str, values: dict[str, str]) -> None:
    desk, run = _desk(service), values["run"]
    try:
        if action in ("stop", "kill"):  # of a run that may not have begun yet
            desk.stop(run, at_once=action == "kill")
        elif action == "export":
            desk.export(find_run(service, run), values["type"])
        elif action == "merge":
            desk.merge(find_run(service, run))
        else:
            desk.resume(find_run(service, run))
    except UserError as error:
        raise ApiError(CONFLICT, without_folders(str(error))) from error


# Files to take away


@router.get("/adapter")
def adapter(request: Request, run: Name) -> Response:
    """Send the adapter of a run as one file."""
    service = service_of(request)
    _desk(service)
    folder = find_run(service, run).folder / "adapter"
    if folder.is_symlink():
        raise ApiError(404, "this run has no adapter of its own")
    try:
        return PackedFolder(folder, f"{run.replace('/', '-')}-adapter.zip")
    except UnreadableError as error:
        raise ApiError(404, f"this run has no adapter that can be read: {error}") from error


@router.get("/gguf/{kind}")
def gguf(request: Request, kind: str, run: Name) -> Response:
    """Send the merged model of a run as GGUF."""
    service = service_of(request)
    _desk(service)
    folder = find_run(service, run).folder
    state = gguf_state(folder, kind) if kind in GGUF_TYPES else "missing"
    if state == "missing":
        raise ApiError(404, "this run has no such file")
    if state == "old":
        raise ApiError(CONFLICT, "the file is not of the adapter as it is now: merge it again")
    headers, name = {"cache-control": "no-store"}, f"{run.replace('/', '-')}-{kind}.gguf"
    media_type, path = "application/octet-stream", gguf_path(folder, kind)
    return FileResponse(path, media_type=media_type, filename=name, headers=headers)


# What they have in common


def _desk(service: Service) -> TrainingDesk:
    if service.training is None:
        raise ApiError(404, OFF, code="training_is_off")
    return service.training


def _file(desk: TrainingDesk, name: str) -> DataFile:
    file = desk.data.files().get(name)
    if file is None:
        raise ApiError(404, "there are no such data in the folder; the list shows what is there")
    return file


def _run_url(name: str) -> str:
    return f"/runs/{quote(name, safe='/')}"


def _to(url: str) -> Response:
    """Lead a browser to a page after a form."""
    return RedirectResponse(url, 303, {"cache-control": "no-store"})
