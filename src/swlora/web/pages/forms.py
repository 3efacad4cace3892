"""What a person filled in: from the fields of a form to a request, and back onto the page.

Numbers come as text here; their bounds are those of the API (`schemas`). Without JavaScript a form
reloads its page with the texts on it; with it, the same fields are sent to /api/generate.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData

from swlora.plural import counted
from swlora.web.answers import WholeText, collect
from swlora.web.generation import Finish
from swlora.web.guard import FORM_TYPE
from swlora.web.page_api import describe, text_requests
from swlora.web.problems import ApiError, validation_problem
from swlora.web.schemas import GenerateBody
from swlora.web.service import Service

MAX_FIELDS = 100
NUMBERS: dict[str, type[int] | type[float]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "repetition_penalty": float,
    "seed": int,
}
LABELS = {"max_tokens": "max tokens", "top_p": "top-p", "repetition_penalty": "repetition penalty"}
SAMPLED = {"temperature": "0.7", "top_p": "0.9", "repetition_penalty": "1.1", "seed": ""}
GREEDY = {"temperature": "0", "top_p": "1", "repetition_penalty": "1", "seed": ""}
ENDS = {"stop": "ended by itself", "length": "full length"}


@dataclass
class Pane:
    """One text on the page; `side` says of which model, `prompt` is shown before what it wrote."""

    name: str
    note: str = ""
    prompt: str = ""
    text: str = ""
    stats: str = ""
    is_shown: bool = True
    is_changed: bool = False  # it shows a model that is not as it was


@dataclass
class Filled:
    """The state of a page with a form: the values of its fields, its texts, what went wrong."""

    values: dict[str, str]
    chosen: list[str] = field(default_factory=list)  # of fields that may be given several times
    panes: list[Pane] = field(default_factory=list)
    seed: int | None = None  # with which the texts were written
    problem: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def refuse(self, error: ApiError) -> None:
        """Say on the page what went wrong."""
        self.problem, self.status, self.headers = error.message, error.status, error.headers


def length(service: Service, n_tokens: int) -> str:
    """Return what a form asks for at first: `n_tokens`, or all that the server writes."""
    return str(min(n_tokens, service.spec.max_tokens))


async def read_form(request: Request, filled: Filled) -> FormData:
    """Read a form that was sent; its fields replace the defaults in `filled`.

    Raises ApiError for a body that is no form.
    """
    if not request.headers.get("content-type", "").lower().startswith(FORM_TYPE):
        raise ApiError(
            415, "this page takes a form; programs use /v1 or /api", code="unsupported_type"
        )
    form = await request.form(max_fields=MAX_FIELDS)
    for name, value in form.multi_items():
        if isinstance(value, str):
            text = value.replace("\r\n", "\n")  # which browsers make of a line break
            if name == "zeroed":
                filled.chosen.append(text)
            else:
                filled.values[name] = text
    return form


def settings_of(values: dict[str, str]) -> dict[str, Any]:
    """Return the numbers of a form as the API takes them; ApiError for what is none.

    A seed is drawn where none is given, so that the page can tell it.
    """
    fields: dict[str, Any] = {}
    for name, kind in NUMBERS.items():
        text = values.get(name, "").strip()
        if not text:
            continue
        try:
            fields[name] = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ApiError(400, f"{LABELS.get(name, name)} must be {what}") from None
    return {"seed": secrets.randbits(31), **fields}


def body_of(
    settings: dict[str, Any], sides: Sequence[dict[str, Any]], **source: Any
) -> GenerateBody:
    """Return the request for `source`, a prompt or messages; ApiError where the API refuses it."""
    try:
        return GenerateBody.model_validate({**settings, "sides": list(sides), **source})
    except ValidationError as error:
        raise validation_problem(error.errors()) from error


async def collected(
    request: Request, service: Service, bodies: Sequence[GenerateBody]
) -> list[WholeText] | None:
    """Return the texts of all bodies' sides; None where the client has left meanwhile.

    Raises ApiError for what is refused, or does not end well.
    """
    wanted = [one for body in bodies for one in await text_requests(service, body)]
    return await collect(service.generate(wanted), request.receive)


async def write_texts(
    request: Request,
    service: Service,
    filled: Filled,
    sides: Sequence[dict[str, Any]],
    *,
    shows_prompt: bool = True,
) -> bool:
    """Write the texts of a form into its panes; False where the client has left meanwhile.

    What is refused, or does not end well, is said on the page. `shows_prompt` puts the prompt
    before its continuation.
    """
    try:
        settings, prompt = settings_of(filled.values), filled.values.get("prompt", "")
        if not prompt.strip():
            raise ApiError(400, "write a prompt")
        texts = await collected(request, service, [body_of(settings, sides, prompt=prompt)])
    except ApiError as error:
        filled.refuse(error)
        return True
    if texts is None:
        return False
    filled.seed = settings["seed"]
    for pane, text in zip(filled.panes, texts, strict=False):
        pane.stats = stats(text)
        pane.prompt = before(service, pane.name, prompt) if shows_prompt else ""
        pane.text = text.text if pane.prompt else text.text.lstrip()
    return True


def before(service: Service, model: str, prompt: str) -> str:
    """Return what stands before a continuation: the prompt, and what the adapter puts behind it."""
    entry = service.folders.adapters().get(model)
    separator = entry.separator if entry else ""
    return prompt + ("" if prompt.endswith(separator) else separator)


def offer(service: Service) -> dict[str, Any]:
    """Return what may be chosen on a form."""
    adapters = service.folders.adapters().values()
    has_restaurant = service.references is not None or any(entry.is_e2e for entry in adapters)
    formats = {"/write": "Text", "/chat": "Chat", "/restaurant": "Restaurant"}
    there = {"/write": True, "/chat": service.has_chat, "/restaurant": has_restaurant}
    return {
        **describe(service),
        "separators": {entry.name: entry.separator for entry in adapters},
        "trained_on": {entry.name: entry.format for entry in adapters},
        "formats": {url: name for url, name in formats.items() if there[url]},
    }


def opens_in_chat(service: Service, model: str) -> bool:
    """Say whether a model is for chats: an instruct model, and adapters that saw no other rows."""
    entry = service.folders.adapters().get(model)
    return service.has_chat and (entry is None or entry.format != "text")


def stats(text: WholeText) -> str:
    """Return what is said of a text that is complete."""
    finish = text.finish
    assert isinstance(finish, Finish)
    rate = finish.n_tokens / max(finish.seconds, 1e-3)
    how = ENDS.get(finish.reason, finish.reason)
    return f"{counted(finish.n_tokens, 'token')} · {rate:.1f} tokens/s · {how}"
