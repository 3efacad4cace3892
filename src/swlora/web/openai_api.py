"""The part of the OpenAI API that a language model can serve: models, completions, chats."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from swlora.decoding.sampling import own_seed
from swlora.evaluation.text_stream import prompt_offsets
from swlora.web.answers import EventStream, client_left, collect, sse
from swlora.web.generation import Echo, Finish, Generation, TextRequest
from swlora.web.problems import json_response
from swlora.web.schemas import ChatBody, CompletionBody
from swlora.web.service import Service, service_of
from swlora.web.shapes import ChatShape, CompletionShape, Shape
from swlora.web.tickets import Variant

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
    """Continue prompts, each given as text or as tokens."""
    service = service_of(request)
    service.check_number(len(body.prompts) * body.n)
    variant = await service.find_variant(body.model)
    texts = []
    for prompt in body.prompts:
        ids = await service.encode(prompt, variant) if isinstance(prompt, str) else prompt
        echo = await _echo(service, prompt, ids, variant) if body.echo else None
        text = service.request(
            variant, ids, body, max_tokens=COMPLETION_TOKENS, n_logprobs=body.logprobs, echo=echo
        )
        texts += choices_of(text, body.n)
    shape = CompletionShape(service.loaded.tokenizer, body.logprobs is not None)
    return await _answer(request, service, body, texts, shape)


@router.post("/chat/completions")
async def chat(request: Request, body: ChatBody) -> Response:
    """Write the next turn of a chat."""
    service = service_of(request)
    service.check_number(body.n)
    variant = await service.find_variant(body.model)
    ids = await service.encode_chat(body.messages)
    if body.max_completion_tokens is not None:
        body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
    n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    text = service.request(variant, ids, body, max_tokens=CHAT_TOKENS, n_logprobs=n_logprobs)
    shape = ChatShape(service.loaded.tokenizer, body.logprobs)
    return await _answer(request, service, body, choices_of(text, body.n), shape)


def choices_of(text: TextRequest, n: int) -> list[TextRequest]:
    """Return `n` requests for a text, the first as it is, the others with seeds made from its own.

    So a choice depends on the seed and its place, not on how many there are.
    """
    requests = [text]
    for k in range(1, n):
        seed = own_seed(text.sampling.seed % 2**64, k)
        requests.append(replace(text, sampling=replace(text.sampling, seed=seed)))
    return requests


async def _echo(
    service: Service, prompt: str | list[int], ids: list[int], variant: Variant
) -> Echo:
    """Return what is given back of a prompt, with what an adapter puts behind it."""
    tokenizer, text = service.loaded.tokenizer, None
    if isinstance(prompt, str):
        text = prompt + await service.separator(prompt, variant)

    def make() -> Echo:
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False) if text is None else text
        return Echo(whole, tuple(prompt_offsets(tokenizer, ids, whole)))

    return await asyncio.to_thread(make)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started_s, "owned_by": "swlora"}


async def _answer(
    request: Request,
    service: Service,
    body: CompletionBody | ChatBody,
    requests: Sequence[TextRequest],
    shape: Shape,
) -> Response:
    generation = service.generate(requests)
    id_ = f"{shape.id_prefix}-{secrets.token_hex(12)}"
    head = {"id": id_, "created": int(time.time()), "model": body.model}
    if body.stream:
        return EventStream(generation, _chunks(generation, head, shape, body))
    texts = await collect(generation, request.receive)
    if texts is None:
        return client_left()
    choices = []
    for index, text in enumerate(texts):
        assert text.finish is not None
        choice = shape.whole(text.text, text.tokens, text.finish.reason)
        choices.append({"index": index, **choice})
    usage = _usage([text.finish for text in texts if text.finish], body.n)
    return json_response({**head, "object": shape.whole_name, "choices": choices, "usage": usage})


async def _chunks(
    generation: Generation, head: dict[str, Any], shape: Shape, body: CompletionBody | ChatBody
) -> AsyncGenerator[str]:
    """Write a stream: pieces of the texts, the reason of each end, perhaps the usage, and [DONE].

    The first text that fails ends them all.
    """
    head = {**head, "object": shape.part_name}
    no_usage = {"usage": None} if body.streams_usage else {}

    def chunk(index: int, choice: dict[str, Any]) -> str:
        return sse({**head, "choices": [{"index": index, **choice}], **no_usage})

    finishes: dict[int, Finish] = {}
    for index in range(generation.n_texts):
        for choice in shape.opening():
            yield chunk(index, choice)
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.text or delta.tokens:
                yield chunk(delta.index, shape.part(delta.text, delta.tokens, None))
            if delta.finish is None:
                continue
            if delta.finish.error is not None:
                yield sse(delta.finish.error.body())
                break
            finishes[delta.index] = delta.finish
            yield chunk(delta.index, shape.part("", (), delta.finish.reason))
    if body.streams_usage and len(finishes) == generation.n_texts:
        usage = _usage([finishes[index] for index in sorted(finishes)], body.n)
        yield sse({**head, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _usage(finishes: Sequence[Finish], n: int) -> dict[str, int]:
    """Count the tokens of texts, `n` of each prompt; a prompt counts once, as in the OpenAI API."""
    n_prompt = sum(finish.n_prompt_tokens for finish in finishes[::n])
    n_new = sum(finish.n_tokens for finish in finishes)
    total = n_prompt + n_new
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": total}
