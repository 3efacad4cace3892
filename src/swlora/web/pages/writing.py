"""The pages that write: a prompt, a restaurant, and with super weights at zero.

Each is a form that also works without JavaScript: it is sent back filled, with the texts.
"""

import asyncio
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from swlora.web.answers import client_left
from swlora.web.page_api import meaning_and_references
from swlora.web.pages import chatting, forms, restaurant_view, weights_view
from swlora.web.pages.forms import Filled, Pane
from swlora.web.pages.render import READ, Name, page
from swlora.web.problems import ApiError
from swlora.web.service import Service, service_of

FIELD_PREFIX = "field."
WRITE_PROMPT = "The best thing about a quiet morning is"
WEIGHT_PROMPT = "The capital of France is Paris. It is known for"

router = APIRouter(include_in_schema=False)


# A prompt


@router.api_route("/", methods=READ)
def home(request: Request, model: Name = "", compare: Name = "") -> Response:
    """Open the format that fits the model, or the adapter that `model` names."""
    if forms.opens_in_chat(service_of(request), model):
        return chatting.chat(request, model, compare)
    return write(request, model)  # beside the base model anyway


@router.api_route("/write", methods=READ)
def write(request: Request, model: Name = "") -> Response:
    """Show the form for a prompt; `model` chooses the adapter that it starts with."""
    service = service_of(request)
    filled = _write_form(service)
    if model in service.model_names():
        filled.values["compare"] = model if model != service.base_name else ""
        filled.panes = _panes([service.base_name, filled.values["compare"]])
    return _write_page(request, filled)


@router.post("/write")
async def write_posted(request: Request) -> Response:
    """Continue a prompt, for a browser without JavaScript."""
    service = service_of(request)
    filled = await asyncio.to_thread(_write_form, service)
    await forms.read_form(request, filled)
    names = [filled.values["model"], filled.values["compare"]]
    sides = [{"model": name} for name in names if name]
    filled.panes = _panes(names)
    if not await forms.write_texts(request, service, filled, sides):
        return client_left()
    return await asyncio.to_thread(_write_page, request, filled)


def _write_form(service: Service) -> Filled:
    """Return the form as it starts: the base model, compared with the newest adapter."""
    base, adapters = service.base_name, service.folders.adapters()
    names = [name for name in adapters if name != base]
    newest = max(names, key=lambda name: adapters[name].version, default="")
    values = {"prompt": WRITE_PROMPT, "model": base, "compare": newest}
    values |= {"max_tokens": forms.length(service, 128), **forms.SAMPLED}
    return Filled(values, panes=_panes([base, newest]))


def _write_page(request: Request, filled: Filled) -> Response:
    offer = forms.offer(service_of(request))
    return page(request, "write.html", filled.status, filled.headers, form=filled, offer=offer)


def _panes(names: list[str]) -> list[Pane]:
    first, second = names
    return [Pane(first), Pane(second, is_shown=bool(second))]


# Restaurant


@router.api_route("/restaurant", methods=READ)
def restaurant(
    request: Request, example: Annotated[int | None, Query(ge=0, le=10**9)] = None
) -> Response:
    """Show the form for a restaurant; `example` fills in one of the data's."""
    service = service_of(request)
    filled = _restaurant_form(service)
    fields = restaurant_view.start_values(service.references, example)
    return _restaurant_page(request, filled, fields)


@router.post("/restaurant")
async def restaurant_posted(request: Request) -> Response:
    """Describe a restaurant, for a browser without JavaScript."""
    service = service_of(request)
    filled = await asyncio.to_thread(_restaurant_form, service)
    form = await forms.read_form(request, filled)
    fields = {
        name.removeprefix(FIELD_PREFIX): value
        for name, value in form.items()
        if name.startswith(FIELD_PREFIX) and isinstance(value, str)
    }
    names = [filled.values["model"], filled.values["compare"]]
    filled.panes = _panes(names)
    try:
        filled.values["prompt"] = meaning_and_references(service, fields)["prompt"]
    except ApiError as error:
        filled.refuse(error)
    else:
        sides = [{"model": name} for name in names if name]
        if not await forms.write_texts(request, service, filled, sides, shows_prompt=False):
            return client_left()
    return await asyncio.to_thread(_restaurant_page, request, filled, fields)


def _restaurant_form(service: Service) -> Filled:
    filled = _write_form(service)
    filled.values |= forms.GREEDY | {"prompt": "", "max_tokens": forms.length(service, 80)}
    return filled


def _restaurant_page(request: Request, filled: Filled, fields: dict[str, str]) -> Response:
    service = service_of(request)
    meaning: dict[str, Any] = {"prompt": "", "references": None}
    with suppress(ApiError):  # said already, where it was asked for
        meaning = meaning_and_references(service, fields)
    return page(
        request,
        "restaurant.html",
        filled.status,
        filled.headers,
        form=filled,
        offer=forms.offer(service),
        slots=restaurant_view.slot_fields(service.references, fields),
        meaning=meaning,
        has_references=service.references is not None,
        another=restaurant_view.another(service.references),
    )


# Super weights


@router.api_route("/super-weights", methods=READ)
def super_weights(request: Request, run: Name = "") -> Response:
    """Show the super weights that were found, and the form that sets them to zero."""
    service = service_of(request)
    return _weights_page(request, _weights_form(service), run)


@router.post("/super-weights")
async def super_weights_posted(request: Request, run: Name = "") -> Response:
    """Continue a prompt with and without some weights, for a browser without JavaScript."""
    service = service_of(request)
    filled = await asyncio.to_thread(_weights_form, service)
    filled.chosen = []
    await forms.read_form(request, filled)
    model = filled.values["model"]
    sides: list[dict[str, Any]] = [{"model": model}]
    if filled.chosen:
        sides.append({"model": model, "zeroed": filled.chosen})
    filled.panes = _weight_panes(model, filled.chosen)
    if not await forms.write_texts(request, service, filled, sides):
        return client_left()
    return await asyncio.to_thread(_weights_page, request, filled, run)


def _weights_form(service: Service) -> Filled:
    """Return the form as it starts: the model as it is beside the best proved weight at zero."""
    base = service.base_name
    values = {"prompt": WEIGHT_PROMPT, "model": base}
    values |= {"max_tokens": forms.length(service, 64), **forms.GREEDY}
    chosen = [weight.id for weight in service.weights.offered().values()][:1]
    return Filled(values, chosen, _weight_panes(base, chosen))


def _weight_panes(model: str, chosen: list[str]) -> list[Pane]:
    changed = Pane(model, "ticked weights at zero", is_shown=bool(chosen), is_changed=True)
    return [Pane(model, "as it is"), changed]


def _weights_page(request: Request, filled: Filled, run: str) -> Response:
    service = service_of(request)
    rows = weights_view.weight_rows(service)
    return page(
        request,
        "weights.html",
        filled.status,
        filled.headers,
        form=filled,
        offer=forms.offer(service),
        proved=[row for row in rows if row.verdict != "none"],
        others=[row for row in rows if row.verdict == "none"],
        finding=weights_view.finding(service, rows, run),
    )
