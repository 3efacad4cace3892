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
LABELS = {
    "max_tokens": "the length",
    "temperature": "surprise",
    "top_p": "the choice of words",
    "repetition_penalty": "the penalty for repeating",
    "seed": "the seed",
}
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
    is_off: bool = False


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


def body_of(values: dict[str, str], sides: Sequence[dict[str, Any]]) -> GenerateBody:
    """Return the request that a form makes; ApiError for what the API would refuse.

    A seed is drawn where none is given, so that the page can tell it.
    """
    fields: dict[str, Any] = {"sides": list(sides)}
    for name, kind in NUMBERS.items():
        text = values.get(name, "").strip()
        if not text:
            continue
        try:
            fields[name] = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ApiError(400, f"{LABELS[name]} must be {what}") from None
    fields.setdefault("seed", secrets.randbits(31))
    prompt = values.get("prompt", "")
    if not prompt.strip():
        raise ApiError(400, "write something to go on from")
    if values.get("mode") == "chat":
        fields["messages"] = [{"role": "user", "content": prompt}]
    else:
        fields["prompt"] = prompt
    try:
        return GenerateBody.model_validate(fields)
    except ValidationError as error:
        raise validation_problem(error.errors()) from error


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
        body = body_of(filled.values, sides)
        generation = service.generate(await text_requests(service, body))
        texts = await collect(generation, request.receive)
    except ApiError as error:
        filled.refuse(error)
        return True
    if texts is None:
        return False
    filled.seed = body.seed
    for pane, text in zip(filled.panes, texts, strict=False):
        pane.stats = stats(text)
        pane.prompt = before(service, pane.name, body) if shows_prompt else ""
        pane.text = text.text if pane.prompt else text.text.lstrip()
    return True


def before(service: Service, model: str, body: GenerateBody) -> str:
    """Return what stands before a continuation: the prompt, and what the adapter puts behind it."""
    if body.prompt is None:
        return ""
    separator = separators(service).get(model, "")
    return body.prompt + ("" if body.prompt.endswith(separator) else separator)


def offer(service: Service) -> dict[str, Any]:
    """Return what may be chosen on a form."""
    return {**describe(service), "separators": separators(service)}


def separators(service: Service) -> dict[str, str]:
    """Return what every adapter puts between prompt and completion."""
    return {name: entry.separator for name, entry in service.folders.adapters().items()}


def stats(text: WholeText) -> str:
    """Return what is said of a text that is complete."""
    finish = text.finish
    assert isinstance(finish, Finish)
    rate = finish.n_tokens / max(finish.seconds, 1e-3)
    how = ENDS.get(finish.reason, finish.reason)
    return f"{finish.n_tokens} tokens · {rate:.1f} tokens/s · {how}"
