"""Templates to HTML. Everything that is put into one is escaped."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Query, Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse, Response

from swlora.plural import counted
from swlora.web.guard import API_PREFIXES
from swlora.web.pages.static import asset_url
from swlora.web.problems import ApiError
from swlora.web.service import service_of

FOLDER = Path(__file__).parents[1] / "templates"
SECTIONS = (  # where it leads, its name, the pages that are part of it
    ("/", "Write", ("/write", "/chat", "/restaurant")),
    ("/super-weights", "Super weights", ()),
    ("/runs", "Runs", ("/runs/", "/studies/")),
)
TRAINING = ("/train", "Train", ("/train/",))  # where the server may train
UNCHANGED = 204
READ = ["GET", "HEAD"]
Name = Annotated[str, Query(max_length=600)]


@cache
def environment() -> Environment:
    """Return the templates' environment."""
    found = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    found.filters["path"] = lambda name: quote(name, safe="/")
    found.globals |= {"asset": asset_url, "counted": counted}
    return found


def html(template: str, **values: Any) -> str:
    """Fill a template."""
    return environment().get_template(template).render(**values)


def page(
    request: Request,
    template: str,
    status: int = 200,
    headers: dict[str, str] | None = None,
    **values: Any,
) -> Response:
    """Answer with a page."""
    service = service_of(request)
    frame = {
        "path": request.url.path,
        "base_name": service.base_name,
        "sections": SECTIONS if service.training is None else (*SECTIONS, TRAINING),
    }
    text = html(template, **frame, **values)
    return _response(text, status, headers or {})


def fragment(
    seen: str, template: str, *, is_over: bool = False, is_other_page: bool = False, **values: Any
) -> Response:
    """Answer with a part of a page, or with nothing where the page has it already.

    `seen` is the version that the page has, `is_over` says that nothing will change any more,
    `is_other_page` that the whole page has become another one.
    """
    text = html(template, **values)
    version = version_of(text)
    headers = {"x-version": version}
    headers |= ({"x-over": "1"} if is_over else {}) | ({"x-reload": "1"} if is_other_page else {})
    if seen == version:
        return Response(status_code=UNCHANGED, headers=headers)
    return _response(text, 200, headers)


def version_of(text: str) -> str:
    """Return a short name for a text as it is."""
    return hashlib.sha256(_bytes(text)).hexdigest()[:16]


def live(template: str, **values: Any) -> dict[str, Any]:
    """Return a part of a page, which is asked for again, and its version."""
    text = html(template, **values)
    return {"text": Markup(text), "version": version_of(text)}


def wants_page(request: Request) -> bool:
    """Say whether a person, rather than a program, is to be told of a problem."""
    is_api = request.url.path.startswith((*API_PREFIXES, "/static/"))
    return not is_api and "text/html" in request.headers.get("accept", "")


def problem_page(request: Request, problem: ApiError) -> Response:
    """Answer with a page that says what went wrong."""
    return page(request, "problem.html", problem.status, problem.headers, problem=problem)


def _response(text: str, status: int, headers: dict[str, str]) -> Response:
    return HTMLResponse(_bytes(text), status, {"cache-control": "no-store", **headers})


def _bytes(text: str) -> bytes:
    """Encode a page, in which a name of a file may be no proper text."""
    return text.encode("utf-8", "replace")
