"""What a request may ask for: strict types, bounded numbers, unknown fields refused.

Fields and defaults of /v1 are those of the OpenAI API, as far as this server has them;
`repetition_penalty` and `top_k` are additions that other servers share.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from swlora.web.neutral import (
    MAX_CHARACTERS,
    Body,
    Message,
    Neutral,
    NeutralChat,
    only,
    refused_with,
)

MAX_STOPS, MAX_STOP_CHARACTERS = 4, 64
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS, MAX_CHOICES = 2048, 128
MAX_TOKENS = 1_000_000
INT64 = 2**63

Name = Annotated[str, Field(min_length=1, max_length=300)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOPS)]
Stop = Annotated[
    StopText | StopTexts,
    refused_with(f"a text of 1 to {MAX_STOP_CHARACTERS} characters, or up to {MAX_STOPS} of them"),
]
PromptText = Annotated[str, Field(max_length=MAX_CHARACTERS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
PromptTexts = Annotated[list[PromptText], Field(min_length=1, max_length=MAX_PROMPTS)]
PromptIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
Prompt = Annotated[
    PromptText | TokenIds | PromptTexts | PromptIds,
    refused_with(
        f"a text of up to {MAX_CHARACTERS} characters, a list of token ids, or up to {MAX_PROMPTS} "
        "of either is needed"
    ),
]


class SamplingBody(Body):
    """How text is continued, the same for every route."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=1_000_000, description="0 and -1 take every token")
    repetition_penalty: float = Field(default=1.0, ge=0.5, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    stop: Stop = Field(default_factory=list)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class StreamOptions(Body):
    """What a stream carries besides text; obfuscation is none of it."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _OpenAiBody(SamplingBody):
    model: Name
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def streams_usage(self) -> bool:
        """Whether the last chunk of a stream shall count the tokens."""
        return self.stream_options.include_usage


class CompletionBody(_OpenAiBody, Neutral):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    best_of: int | None = None
    suffix: Annotated[str, Field(max_length=0), only("null")] = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 gives the prompt back, and needs echo true")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: only null or the value of n is accepted")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or token ids."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        texts = [item for item in given if not isinstance(item, int)]
        return [*texts] if texts else [[item for item in given if isinstance(item, int)]]


Messages = Annotated[list[Message], Field(min_length=1, max_length=256)]


class ChatBody(_OpenAiBody, NeutralChat):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same: give one")
        return self


class Side(Body):
    """One of the texts that the page shows beside each other."""

    model: Name
    zeroed: list[Name] = Field(default_factory=list, max_length=16)


class GenerateBody(SamplingBody):
    """POST /api/generate: one prompt, continued by one or two variants of the model."""

    prompt: PromptText | None = None
    messages: Messages | None = None
    sides: list[Side] = Field(min_length=1, max_length=2)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class Restaurant(Body):
    """POST /api/restaurant: what was filled in, by the names of the fields."""

    fields: dict[Name, Annotated[str, Field(max_length=1000)]] = Field(max_length=32)
