"""The two shapes of an answer in the OpenAI API: a completion and a chat's next turn."""

from collections.abc import Sequence
from typing import Any, Protocol

from swlora.web.generation import Scored

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
Choice = dict[str, Any]


class Shape(Protocol):
    """How choices of one route look."""

    id_prefix: str
    whole_name: str
    part_name: str

    def opening(self) -> list[Choice]:
        """Return what a choice begins with in a stream."""

    def whole(self, text: str, tokens: Sequence[Scored], reason: str) -> Choice:
        """Return the choice of a complete answer, without its index, as the others."""

    def part(self, text: str, tokens: Sequence[Scored], reason: str | None) -> Choice:
        """Return the choice of a piece of a stream; `reason` comes with the last."""


class CompletionShape:
    """POST /v1/completions; the token that ends a text is among the log-probabilities."""

    id_prefix = "cmpl"
    whole_name = part_name = "text_completion"

    def __init__(self, tokenizer: Any, wants_logprobs: bool) -> None:
        self._tokenizer, self._wants_logprobs = tokenizer, wants_logprobs

    def opening(self) -> list[Choice]:
        """Return nothing: the first piece is text."""
        return []

    def whole(self, text: str, tokens: Sequence[Scored], reason: str) -> Choice:
        """Return the choice of a complete answer."""
        return self.part(text, tokens, reason)

    def part(self, text: str, tokens: Sequence[Scored], reason: str | None) -> Choice:
        """Return a piece of text."""
        logprobs = self._logprobs(tokens) if self._wants_logprobs and tokens else None
        return {"text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Scored]) -> dict[str, Any]:
        return {
            "tokens": [_text(self._tokenizer, token.token_id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _alternatives(self, token: Scored) -> dict[str, float] | None:
        if token.logprob is None:  # nothing stands before the first token of a prompt
            return None
        named: dict[str, float] = {}
        for token_id, logprob in token.top_logprobs:  # the likeliest first
            named.setdefault(_text(self._tokenizer, token_id), logprob)
        named.setdefault(_text(self._tokenizer, token.token_id), token.logprob)  # as OpenAI does
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

    def whole(self, text: str, tokens: Sequence[Scored], reason: str) -> Choice:
        """Return the whole turn."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._choice({"message": message}, tokens, reason)

    def part(self, text: str, tokens: Sequence[Scored], reason: str | None) -> Choice:
        """Return a piece of the turn."""
        return self._choice({"delta": {"content": text} if text else {}}, tokens, reason)

    def _choice(self, content: Choice, tokens: Sequence[Scored], reason: str | None) -> Choice:
        logprobs = None
        if self._wants_logprobs and tokens:
            said = [self._logprob(token) for token in tokens if not token.is_end]
            logprobs = {"content": said, "refusal": None}
        return {**content, "logprobs": logprobs, "finish_reason": reason}

    def _logprob(self, token: Scored) -> dict[str, Any]:
        top = [self._named(token_id, logprob) for token_id, logprob in token.top_logprobs]
        return {**self._named(token.token_id, token.logprob), "top_logprobs": top}

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
