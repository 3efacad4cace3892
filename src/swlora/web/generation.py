"""Texts that are being written for one client: tokens from the scheduler, text to the client.

The client's side runs in the event loop; leaving `deltas` for whatever reason (the end, an error,
a client that has gone) stops the computation.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from swlora.decoding.batch import DecodeRequest, Event
from swlora.decoding.sampling import Sampling
from swlora.evaluation.text_stream import Detokeniser, StopFilter
from swlora.web.problems import ApiError
from swlora.web.prometheus import Metrics
from swlora.web.scheduler import Scheduler
from swlora.web.tickets import (
    Ended,
    ModelFailedError,
    QueueFullError,
    ShuttingDownError,
    Ticket,
    Variant,
)

_IDS = itertools.count()
MODEL_FAILED = "the model failed and does not answer as it did; the server's log says why"
NO_RETRY = {"x-should-retry": "false"}  # the official client would only wait as long again


@dataclass(frozen=True)
class Echo:
    """The text of a prompt that shall be given back, and where in it each token begins."""

    text: str
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class TextRequest:
    """One text that is asked for, checked and tokenised.

    `echo` is there where the prompt shall come first; `max_tokens` may be 0 then.
    """

    variant: Variant
    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    echo: Echo | None = None


@dataclass(frozen=True)
class Finish:
    """How a text ended; `error` is set where it did not end well."""

    reason: str
    n_prompt_tokens: int
    n_tokens: int
    seconds: float
    error: ApiError | None = None


@dataclass(frozen=True)
class Scored:
    """A token with its probability in nats (see `Event`), and where in the text it begins.

    `is_end` marks the token that ended the text and is no part of it.
    """

    token_id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    offset: int
    is_end: bool = False


@dataclass(frozen=True)
class Delta:
    """News of text number `index`: more text, the tokens behind it, and perhaps its end.

    `n_tokens` counts all that were written so far; `tokens` are there where asked for.
    """

    index: int
    text: str = ""
    tokens: tuple[Scored, ...] = ()
    finish: Finish | None = None
    n_tokens: int = 0


class Generation:
    """One or more texts, taken on together or not at all (ApiError)."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Any,
        metrics: Metrics,
        requests: Sequence[TextRequest],
    ) -> None:
        self._scheduler, self._metrics = scheduler, metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event | Ended]] = asyncio.Queue()
        self._texts = [_Text(index, tokenizer, r) for index, r in enumerate(requests)]
        self._tickets = [self._ticket(index, request) for index, request in enumerate(requests)]
        try:
            scheduler.submit(self._tickets)
        except QueueFullError as error:
            raise ApiError(
                429,
                f"the server is busy; ask again in {error.retry_after_s} s",
                code="queue_full",
                headers={"retry-after": str(error.retry_after_s)},
            ) from error
        except ShuttingDownError as error:
            raise ApiError(
                503, "the server is shutting down", headers={"retry-after": "10"}
            ) from error
        except ModelFailedError as error:
            raise ApiError(
                503, MODEL_FAILED, code="failed", headers={"retry-after": "10"}
            ) from error

    @property
    def n_texts(self) -> int:
        """Number of texts."""
        return len(self._texts)

    def cancel(self) -> None:
        """Stop the computation."""
        self._scheduler.cancel(self._tickets)

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Yield what is written, as it is written; every text ends with its `finish`."""
        n_open = len(self._texts)
        try:
            while n_open:
                index, item = await self._queue.get()
                text = self._texts[index]
                if text.finish:  # a stop text was met, and the model was some tokens ahead
                    continue
                delta = text.take(item)
                if text.n_tokens == 1 and isinstance(item, Event):
                    self._metrics.first_token(text.seconds)
                if delta.finish:
                    n_open -= 1
                    self._scheduler.cancel([self._tickets[index]])
                if delta.text or delta.tokens or delta.finish:
                    yield delta
        finally:
            self.cancel()
            for text in self._texts:
                reason = text.finish.reason if text.finish else "cancelled"
                self._metrics.text(reason, text.n_prompt_tokens, text.n_tokens)

    def _ticket(self, index: int, request: TextRequest) -> Ticket:
        asked = DecodeRequest(
            next(_IDS),
            request.prompt_ids,
            max(1, request.max_tokens),  # after a prompt that is only scored, one costs nothing
            sampling=request.sampling,
            prompt_logprobs=None if request.echo is None else request.sampling.logprobs,
        )
        return Ticket(asked, request.variant, partial(self._deliver, index))

    def _deliver(self, index: int, item: Event | Ended) -> None:
        """Hand news over from the model's thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))
        except RuntimeError:  # the loop has ended, and with it whoever listened
            self._tickets[index].cancelled = True


class _Text:
    """One text: what its tokens say, and how it ends."""

    def __init__(self, index: int, tokenizer: Any, request: TextRequest) -> None:
        self._index, self._start_s = index, time.perf_counter()
        self._request = request
        self._detokeniser = Detokeniser(tokenizer, request.prompt_ids)
        self._filter = StopFilter(request.stops)
        self._n_characters = 0
        self._tokens: list[Scored] = []  # whose text has not been given out
        self.n_prompt_tokens, self.n_tokens = len(request.prompt_ids), 0
        self.finish: Finish | None = None

    @property
    def seconds(self) -> float:
        """The time since the text was asked for."""
        return time.perf_counter() - self._start_s

    def take(self, item: Event | Ended) -> Delta:
        """Take news; return what it means for the client."""
        if isinstance(item, Ended):
            return self._delta("", self._finish(item.reason, _error(item)))
        echo = self._opening(item) if self.n_tokens == 0 else ""
        if self._request.max_tokens == 0:
            return self._delta(echo, self._finish("length"))
        self.n_tokens += 1
        ends_here = item.finish_reason in ("eos", "stop")
        piece = "" if ends_here else self._detokeniser.add(item.token_id)
        self._note(item, piece, ends_here)
        text = self._filter.add(piece)
        if item.finish_reason and not self._filter.stopped:
            text += self._filter.add(self._detokeniser.finish())
            text += self._filter.finish()
        if ends_here or self._filter.stopped:
            return self._delta(echo + text, self._finish("stop"))
        return self._delta(echo + text, self._finish("length") if item.finish_reason else None)

    def _opening(self, first: Event) -> str:
        """Return the prompt where it shall be given back, and note its tokens."""
        echo = self._request.echo
        if echo is None:
            return ""
        self._tokens = [
            Scored(choice.token_id, choice.logprob, choice.top_logprobs, offset)
            for choice, offset in zip(first.prompt, echo.offsets, strict=False)  # perhaps no scores
        ]
        self._n_characters = len(echo.text)
        return echo.text

    def _note(self, event: Event, piece: str, is_end: bool) -> None:
        if event.logprob is not None:
            top = event.top_logprobs
            scored = Scored(event.token_id, event.logprob, top, self._n_characters, is_end)
            self._tokens.append(scored)
        self._n_characters += len(piece)

    def _finish(self, reason: str, error: ApiError | None = None) -> Finish:
        return Finish(reason, self.n_prompt_tokens, self.n_tokens, self.seconds, error)

    def _delta(self, text: str, finish: Finish | None) -> Delta:
        self.finish = finish
        tokens: tuple[Scored, ...] = ()
        if text or finish:
            tokens, self._tokens = tuple(self._tokens), []
        return Delta(self._index, text, tokens, finish, self.n_tokens)


def _error(ended: Ended) -> ApiError:
    """Return what a client is told of a text that did not end well."""
    status = {"refused": 400, "deadline": 408, "shutdown": 503}.get(ended.reason, 500)
    return ApiError(status, ended.message, code=ended.reason, headers=NO_RETRY)
