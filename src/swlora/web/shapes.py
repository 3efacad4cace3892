"""The two shapes of an answer in the OpenAI API: a completion and a chat's next turn."""

from collections.abc import Sequence
from typing import Any, Protocol

from swlora.engine.batch_decoder import Event

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
Choice = dict[str, Any]


class Shape(Protocol):
    """How choices of one route look; an object serves one answer."""

    id_prefix: str
    whole_name: str
    part_name: str

    def opening(self) -> list[Choice]:
        """Return what a stream begins with."""

    def whole(self, text: str, tokens: Sequence[Event], reason: str) -> Choice:
        """Return the choice of a complete answer."""

    def part(self, text: str, tokens: Sequence[Event], reason: str | None) -> Choice:
        """Return the choice of a piece of a stream; `reason` comes with the last."""


class CompletionShape:
    """POST /v1/completions; the log-probabilities of a stream count their offsets on."""

    id_prefix = "cmpl"
    whole_name = part_name = "text_completion"

    def __init__(self, tokenizer: Any, wants_logprobs: bool) -> None:
        self._tokenizer, self._wants_logprobs = tokenizer, wants_logprobs
        self._offset = 0

    def opening(self) -> list[Choice]:
        """Return nothing: the first piece is text."""
        return []

    def whole(self, text: str, tokens: Sequence[Event], reason: str) -> Choice:
        """Return the choice of a complete answer."""
        return self.part(text, tokens, reason)

    def part(self, text: str, tokens: Sequence[Event], reason: str | None) -> Choice:
        """Return a piece of text."""
        logprobs = self._logprobs(tokens) if self._wants_logprobs and tokens else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Event]) -> dict[str, Any]:
        texts = [_text(self._tokenizer, event.token_id) for event in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [event.logprob for event in tokens],
            "top_logprobs": [self._alternatives(event) for event in tokens],
            "text_offset": offsets,
        }

    def _alternatives(self, event: Event) -> dict[str, float]:
        named: dict[str, float] = {}
        for token_id, logprob in event.top_logprobs:  # the likeliest first
            named.setdefault(_text(self._tokenizer, token_id), logprob)
        return named


class ChatShape:
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_name = "chat.completion"
    part_name = "chat.completion.chunk"

    def __init__(self, tokenizer: Any, wants_logprobs: bool) -> None:
        self._tokenizer, self._wants_logprobs = tokenizer, wants_logprobs

    def opening(self) -> list[Choice]:
        """Return the turn's role."""
        return [self._choice({"delta": {"role": "assistant", "content": ""}}, (), None)]

    def whole(self, text: str, tokens: Sequence[Event], reason: str) -> Choice:
        """Return the whole turn."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._choice({"message": message}, tokens, reason)

    def part(self, text: str, tokens: Sequence[Event], reason: str | None) -> Choice:
        """Return a piece of the turn."""
        return self._choice({"delta": {"content": text} if text else {}}, tokens, reason)

    def _choice(self, content: Choice, tokens: Sequence[Event], reason: str | None) -> Choice:
        logprobs = None
        if self._wants_logprobs and tokens:
            logprobs = {"content": [self._logprob(event) for event in tokens], "refusal": None}
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": reason}

    def _logprob(self, event: Event) -> dict[str, Any]:
        top = [self._named(token_id, logprob) for token_id, logprob in event.top_logprobs]
        return {**self._named(event.token_id, event.logprob), "top_logprobs": top}

    def _named(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = _text(self._tokenizer, token_id)
        is_whole = REPLACEMENT not in text  # the bytes of half a character are not known here
        return {
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode("utf-8")) if is_whole else None,
        }


def _text(tokenizer: Any, token_id: int) -> str:
    return str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
