"""The part of the OpenAI API that a language model can serve: models, completions, chats."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from swlora.web.answers import EventStream, collect, gone, sse
from swlora.web.generation import Finish, Generation, TextRequest
from swlora.web.problems import json_response
from swlora.web.schemas import ChatBody, CompletionBody
from swlora.web.service import Service, service_of
from swlora.web.shapes import ChatShape, CompletionShape, Shape

COMPLETION_TOKENS = 16  # the API's own default
CHAT_TOKENS = 512

router = APIRouter(prefix="/v1")


@router.get("/models")
def list_models(request: Request) -> Response:
    """List the base model and the adapters."""
    service = service_of(request)
    models = [_model(service, name) for name in service.model_names()]
    return json_response({"object": "list", "data": models})


@router.get("/models/{name:path}")
def retrieve_model(request: Request, name: str) -> Response:
    """Describe one model."""
    service = service_of(request)
    service.variant(name)
    return json_response(_model(service, name))


@router.post("/completions")
async def complete(request: Request, body: CompletionBody) -> Response:
    """Continue a prompt, given as text or as tokens."""
    service = service_of(request)
    variant = await service.find_variant(body.model)
    prompt = body.prompt
    ids = await service.encode(prompt, variant) if isinstance(prompt, str) else prompt
    text = service.request(
        variant, ids, body, max_tokens=COMPLETION_TOKENS, n_logprobs=body.logprobs
    )
    shape = CompletionShape(service.loaded.tokenizer, body.logprobs is not None)
    return await _answer(request, service, body, text, shape)


@router.post("/chat/completions")
async def chat(request: Request, body: ChatBody) -> Response:
    """Write the next turn of a chat."""
    service = service_of(request)
    variant = await service.find_variant(body.model)
    ids = await service.encode_chat(body.messages)
    if body.max_completion_tokens is not None:
        body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
    n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    text = service.request(variant, ids, body, max_tokens=CHAT_TOKENS, n_logprobs=n_logprobs)
    shape = ChatShape(service.loaded.tokenizer, body.logprobs)
    return await _answer(request, service, body, text, shape)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started_s, "owned_by": "swlora"}


async def _answer(
    request: Request,
    service: Service,
    body: CompletionBody | ChatBody,
    text: TextRequest,
    shape: Shape,
) -> Response:
    generation = service.generate([text])
    id_ = f"{shape.id_prefix}-{secrets.token_hex(12)}"
    head = {"id": id_, "created": int(time.time()), "model": body.model}
    if body.stream:
        return EventStream(generation, _chunks(generation, head, shape, body.streams_usage))
    texts = await collect(generation, request.receive)
    if texts is None:
        return gone()
    whole = texts[0]
    assert whole.finish is not None
    choice = shape.whole(whole.text, whole.tokens, whole.finish.reason)
    answer = {"object": shape.whole_name, "choices": [choice], "usage": whole.finish.usage}
    return json_response({**head, **answer})


async def _chunks(
    generation: Generation, head: dict[str, Any], shape: Shape, with_usage: bool
) -> AsyncGenerator[str]:
    """Write a stream: pieces of text, the reason of its end, perhaps the usage, and [DONE]."""
    head = {**head, "object": shape.part_name}
    no_usage = {"usage": None} if with_usage else {}

    def chunk(choice: dict[str, Any]) -> str:
        return sse({**head, "choices": [choice], **no_usage})

    finish: Finish | None = None
    for choice in shape.opening():
        yield chunk(choice)
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            finish = delta.finish
            if delta.text or delta.tokens:
                yield chunk(shape.part(delta.text, delta.tokens, None))
    assert finish is not None
    if finish.error is not None:
        yield sse(finish.error.body())
    else:
        yield chunk(shape.part("", (), finish.reason))
        if with_usage:
            yield sse({**head, "choices": [], "usage": finish.usage})
    yield "data: [DONE]\n\n"
