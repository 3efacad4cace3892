"""The application: routes, the guard before them, and one shape for everything that goes wrong.

Programs are told of a problem in JSON, whoever looks at a page by a page.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from swlora.web import openai_api, page_api
from swlora.web.generation import MODEL_FAILED
from swlora.web.guard import Guard, Policy
from swlora.web.pages import browsing, chatting, static, training, writing
from swlora.web.pages.render import problem_page, wants_page
from swlora.web.problems import ApiError, json_response, validation_problem
from swlora.web.service import Service, service_of


def create_app(service: Service, policy: Policy) -> Guard:
    """Return the ASGI application of a service; the service's thread lives as long as it does.

    The guard is the outermost layer, so that also the answer to a mistake of ours passes it.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    app = FastAPI(
        title="swlora",
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from elsewhere; /openapi.json is there
        redoc_url=None,
    )
    if policy.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(policy.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    app.state.service = service
    for part in (openai_api, page_api, writing, chatting, browsing, training, static):
        app.include_router(part.router)
    for path, route in (
        ("/health", health),
        ("/ready", ready),
        ("/metrics", metrics),
    ):
        app.add_api_route(path, route, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(Exception, _unexpected)
    return Guard(app, policy, service.metrics)


async def health(_request: Request) -> Response:
    """Say that the event loop runs."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """Say whether texts are taken on."""
    scheduler = service_of(request).scheduler
    if scheduler.is_broken:
        raise ApiError(503, MODEL_FAILED, code="failed")
    if not scheduler.is_ready:
        raise ApiError(503, "the server is starting or shutting down")
    return json_response({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Return the numbers for Prometheus."""
    return Response(service_of(request).metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return problem_page(request, error) if wants_page(request) else error.response()


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _refused(request, validation_problem(error.errors()))


async def _http_problem(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses: unknown paths, methods, bodies that are no JSON."""
    assert isinstance(error, HTTPException)
    problem = ApiError(error.status_code, str(error.detail), headers=error.headers)
    return await _refused(request, problem)


async def _unexpected(_request: Request, _error: Exception) -> Response:
    """Answer a mistake of ours; the framework raises it again, so that the log has it."""
    return ApiError(500, "the server failed; its log says why").response()
