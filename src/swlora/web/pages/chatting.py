"""The chat: several turns with a model, or with two that are compared, each with its own answers.

The turns so far travel in a field of the form, as JSON: the server keeps nothing of a chat.
"""

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field, TypeAdapter, ValidationError
from starlette.responses import Response

from swlora.web.answers import client_left
from swlora.web.neutral import Body
from swlora.web.pages import forms
from swlora.web.pages.forms import Filled, Pane
from swlora.web.pages.render import READ, Name, page
from swlora.web.problems import ApiError
from swlora.web.service import Service, service_of

MAX_TURNS = 120  # the API takes 256 messages

router = APIRouter(include_in_schema=False)


class Turn(Body):
    """What was said, and the answer of each model; one that joined later shares the first's."""

    user: str
    answers: list[str] = Field(min_length=1, max_length=2)

    def answer(self, side: int) -> str:
        """Return the answer of a side."""
        return self.answers[min(side, len(self.answers) - 1)]


History = TypeAdapter(Annotated[list[Turn], Field(max_length=MAX_TURNS)])


@router.api_route("/chat", methods=READ)
def chat(request: Request, model: Name = "", compare: Name = "") -> Response:
    """Show an empty chat with `model`, else with the base model; beside it, `compare`."""
    service = service_of(request)
    if not service.has_chat:
        raise ApiError(404, "this model has no chat template; the format Text continues a prompt")
    filled = _form(service)
    names = service.model_names()
    if model in names:
        filled.values["model"] = model
    if compare in names and compare != filled.values["model"]:
        filled.values["compare"] = compare
    filled.panes = _panes(filled)
    return _page(request, filled, [])


@router.post("/chat")
async def chat_posted(request: Request) -> Response:
    """Answer a message, for a browser without JavaScript."""
    service = service_of(request)
    filled = await asyncio.to_thread(_form, service)
    await forms.read_form(request, filled)
    filled.panes = _panes(filled)
    turns: list[Turn] = []
    try:
        turns = read_history(filled.values["history"])
        answered = await _answered(request, service, filled, turns)
    except ApiError as error:
        filled.refuse(error)
    else:
        if answered is None:
            return client_left()
        turns = answered
    return await asyncio.to_thread(_page, request, filled, turns)


def read_history(text: str) -> list[Turn]:
    """Read the turns so far; ApiError where the field holds anything else."""
    try:
        return History.validate_json(text or "[]")
    except ValidationError as error:
        raise ApiError(
            400,
            f"the chat so far cannot be read; a chat has {MAX_TURNS} turns at most",
        ) from error


def messages_of(
    turns: Sequence[Turn], side: int, system: str, message: str
) -> list[dict[str, str]]:
    """Return the messages that a side is given: its own chat so far, and what is said now."""
    said = [("system", system)] if system.strip() else []
    for turn in turns:
        said += [("user", turn.user), ("assistant", turn.answer(side))]
    return [{"role": role, "content": text} for role, text in [*said, ("user", message)]]


async def _answered(
    request: Request, service: Service, filled: Filled, turns: list[Turn]
) -> list[Turn] | None:
    """Do what the pressed button says; return the turns then, None where the client has left."""
    action = filled.values["action"]
    if action == "reset":
        return []
    message = filled.values["message"].strip()
    if action == "regenerate":
        if not turns:
            raise ApiError(400, "there is no answer yet that could be written again")
        *turns, last = turns
        message = last.user
    if not message:
        raise ApiError(400, "write a message")
    settings, system = forms.settings_of(filled.values), filled.values["system"]
    bodies = [
        forms.body_of(
            settings, [{"model": name}], messages=messages_of(turns, side, system, message)
        )
        for side, name in enumerate(_names(filled))
    ]
    texts = await forms.collected(request, service, bodies)
    if texts is None:
        return None
    filled.seed = settings["seed"]
    for pane, text in zip(filled.panes, texts, strict=False):
        pane.stats = forms.stats(text)
    if action != "regenerate":
        filled.values["message"] = ""
    return [*turns, Turn(user=message, answers=[text.text.lstrip() for text in texts])]


def _form(service: Service) -> Filled:
    values = {"model": service.base_name, "compare": "", "system": "", "message": ""}
    values |= {"history": "[]", "action": "send"}
    values |= {"max_tokens": forms.length(service, 256), **forms.SAMPLED}
    filled = Filled(values)
    filled.panes = _panes(filled)
    return filled


def _names(filled: Filled) -> list[str]:
    first, second = filled.values["model"], filled.values["compare"]
    return [first, second] if second else [first]


def _panes(filled: Filled) -> list[Pane]:
    first, *others = _names(filled)
    return [Pane(first), Pane(others[0] if others else first, is_shown=bool(others))]


def _page(request: Request, filled: Filled, turns: list[Turn]) -> Response:
    filled.values["history"] = History.dump_json(turns).decode()
    offer = forms.offer(service_of(request))
    values = {"form": filled, "offer": offer, "turns": turns}
    return page(request, "chat.html", filled.status, filled.headers, **values)
