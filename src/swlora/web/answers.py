"""Texts as HTTP responses, whole or as events; their generation ends when the client leaves."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from swlora.web.generation import Finish, Generation, Scored
from swlora.web.problems import json_text

LEFT = 499  # for the log alone, as nginx has it: nobody is there to read it


class EventStream(StreamingResponse):
    """Server-sent events about a generation, which ends with the connection."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncGenerator[str]) -> None:
        super().__init__(events, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the computation stops whatever happens, also before the first event."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def sse(data: Any, event: str | None = None) -> str:
    """Write one server-sent event; its data is JSON, which holds no line break."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json_text(data)}\n\n"


@dataclass
class WholeText:
    """One text when it is complete."""

    text: str = ""
    tokens: list[Scored] = field(default_factory=list)
    finish: Finish | None = None


async def collect(generation: Generation, receive: Receive) -> list[WholeText] | None:
    """Return the texts when all are complete, or None where the client has left before.

    Raises the ApiError of the first text that did not end well.
    """
    writing = asyncio.create_task(_write_all(generation))
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return writing.result() if writing.done() else None
    finally:
        writing.cancel()
        leaving.cancel()
        generation.cancel()


def client_left() -> Response:
    """Return the response for a client that has left."""
    return Response(status_code=LEFT)


async def _write_all(generation: Generation) -> list[WholeText]:
    texts = [WholeText() for _ in range(generation.n_texts)]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            whole = texts[delta.index]
            whole.text += delta.text
            whole.tokens += delta.tokens
            whole.finish = delta.finish
            if delta.finish and delta.finish.error:
                raise delta.finish.error
    return texts


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
