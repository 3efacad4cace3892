"""What the page asks for: texts beside each other, weights switched off, runs, references.

Each route calls one function here or in `folders` and `restaurant`; the page's own routes, which
answer without JavaScript, call the same ones.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from swlora.errors import UserError
from swlora.web.answers import EventStream, sse
from swlora.web.folders import (
    FIGURE_TYPES,
    RunEntry,
    reading,
    run_figures,
    run_metrics,
    run_result,
    run_summary,
    without_folders,
)
from swlora.web.generation import Delta, Generation, TextRequest
from swlora.web.problems import ApiError, json_response
from swlora.web.restaurant import MAX_VALUE_CHARACTERS, SLOTS, meaning_text
from swlora.web.schemas import GenerateBody, Restaurant
from swlora.web.service import Service, service_of

PAGE_TOKENS = 128
# A figure is a file that a run left: shown as an image, it may do nothing.
FIGURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"

router = APIRouter(prefix="/api")
RunName = Annotated[str, Query(min_length=1, max_length=600)]


@router.get("/models")
def models(request: Request) -> Response:
    """Describe what is served: models, weights that may be switched off, limits."""
    return json_response(describe(service_of(request)))


@router.post("/generate")
async def generate(request: Request, body: GenerateBody) -> Response:
    """Stream one prompt, continued by every side."""
    service = service_of(request)
    generation = service.generate(await text_requests(service, body))
    return EventStream(generation, _events(generation))


@router.get("/restaurant")
def restaurant(request: Request) -> Response:
    """Describe the form: its fields, and values that the data have for them."""
    references = service_of(request).references
    values = references.values if references else {}
    fields = [{"name": slot, "values": values.get(slot, [])} for slot in SLOTS]
    limits = {"max_characters": MAX_VALUE_CHARACTERS, "has_references": references is not None}
    return json_response({"fields": fields, **limits})


@router.post("/restaurant")
def meaning(request: Request, body: Restaurant) -> Response:
    """Write filled-in fields as a prompt, with the references that the data have for it."""
    return json_response(meaning_and_references(service_of(request), body.fields))


@router.get("/runs")
def runs(request: Request) -> Response:
    """List the runs, the newest first."""
    return json_response({"runs": list_runs(service_of(request))})


@router.get("/run")
def run(request: Request, name: RunName) -> Response:
    """Return what a run is and what came out of it."""
    entry = find_run(service_of(request), name)
    result = {"result": without_paths(run_result(entry)), "figures": list(run_figures(entry))}
    return json_response({**_summary(entry), **result})


@router.get("/run/metrics")
def metrics(
    request: Request, name: RunName, since: Annotated[int, Query(ge=0, le=10**9)] = 0
) -> Response:
    """Return a run's metrics from line `since` on, for curves that grow."""
    entry = find_run(service_of(request), name)
    return json_response({"status": _summary(entry)["status"], **run_metrics(entry, since)})


@router.get("/run/figure")
def figure(request: Request, name: RunName, file: RunName) -> Response:
    """Return a figure that lies in a run's folder."""
    path = run_figures(find_run(service_of(request), name)).get(file)
    if path is None:
        raise ApiError(404, "this run has no such figure", param="file")
    headers = {"content-security-policy": FIGURE_POLICY, "cache-control": "no-cache"}
    return FileResponse(path, media_type=FIGURE_TYPES[path.suffix], headers=headers)


# The functions behind them


def describe(service: Service) -> dict[str, Any]:
    """Return names and abilities of everything that may be asked for."""
    spec = service.spec
    return {
        "base": service.base_name,
        "source": without_folders(service.loaded.source),
        "adapters": [entry.public() for entry in service.folders.adapters().values()],
        "not_served": [
            {"name": name, "reason": reason}
            for name, reason in service.folders.not_served().items()
        ],
        "weights": [weight.public() for weight in service.weights.offered().values()],
        "has_chat": service.has_chat,
        "context_tokens": service.loaded.context_tokens,
        "max_tokens": spec.max_tokens,
        "default_tokens": min(PAGE_TOKENS, spec.max_tokens),
        "deadline_s": spec.deadline_s,
    }


async def text_requests(service: Service, body: GenerateBody) -> list[TextRequest]:
    """Check and tokenise what a body asks for, one request a side."""
    requests = []
    for side in body.sides:
        variant = await service.find_variant(side.model, side.zeroed)
        if body.messages is not None:
            ids = await service.encode_chat(body.messages)
        else:
            ids = await service.encode(body.prompt or "", variant)
        requests.append(service.request(variant, ids, body, max_tokens=PAGE_TOKENS))
    return requests


def news(delta: Delta) -> dict[str, Any]:
    """Return what the page needs of a delta: side, text, tokens so far, at the end its reason."""
    event: dict[str, Any] = {"side": delta.index, "text": delta.text, "tokens": delta.n_tokens}
    finish = delta.finish
    if finish is not None:
        event["end"] = {
            "reason": finish.reason,
            "error": finish.error.message if finish.error else None,
            "prompt_tokens": finish.n_prompt_tokens,
            "tokens": finish.n_tokens,
            "seconds": round(finish.seconds, 3),
        }
    return event


async def _events(generation: Generation) -> AsyncGenerator[str]:
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            yield sse(news(delta))
    yield sse({}, event="end")


def meaning_and_references(service: Service, fields: dict[str, str]) -> dict[str, Any]:
    """Return the meaning representation of filled-in fields, and its references.

    `references` is None where the server has no data, [] where the data do not have it.
    """
    try:
        text = meaning_text(fields)
    except UserError as error:
        raise ApiError(400, str(error), param="fields") from error
    known = service.references
    return {"prompt": text, "references": known.find(text) if known else None}


def list_runs(service: Service) -> list[dict[str, Any]]:
    """Return a summary of every run that can be read, the newest first."""
    found = []
    for entry in service.folders.runs().values():
        try:
            found.append(_summary(entry))
        except ApiError:  # it is just being written or removed
            continue
    return sorted(found, key=lambda run: str(run["started_at"]), reverse=True)


def find_run(service: Service, name: str) -> RunEntry:
    """Return a run by the name it is listed under; ApiError where there is none."""
    entry = service.folders.runs().get(name)
    if entry is None:
        raise ApiError(404, "there is no such run; GET /api/runs lists them", param="name")
    return entry


def without_paths(value: Any) -> Any:
    """Return JSON values with every absolute path cut to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value


def _summary(entry: RunEntry) -> dict[str, Any]:
    try:
        with reading(entry.name):
            return run_summary(entry)
    except UserError as error:
        raise ApiError(404, "this run cannot be read just now", param="name") from error
