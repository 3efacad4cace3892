"""What a request may ask for: strict types, bounded numbers, unknown fields refused.

Fields and defaults of /v1 are those of the OpenAI API, as far as this server has them;
`repetition_penalty` is an addition that other servers share.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_STOPS, MAX_STOP_CHARACTERS = 4, 64
MAX_TOP_LOGPROBS = 20
INT64 = 2**63

Name = Annotated[str, Field(min_length=1, max_length=300)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOPS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class Body(BaseModel):
    """Base of all request bodies: strict, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SamplingBody(Body):
    """How text is continued, the same for every route."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.5, le=2)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    stop: StopText | StopTexts | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(given)


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False


class _OpenAiBody(SamplingBody):
    model: Name
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: it needs stream true")
        return self

    @property
    def streams_usage(self) -> bool:
        """Whether the last chunk of a stream shall count the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(_OpenAiBody):
    """POST /v1/completions."""

    prompt: Annotated[str, Field(max_length=65_536)] | TokenIds
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)


class Message(Body):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=65_536)


Messages = Annotated[list[Message], Field(min_length=1, max_length=256)]


class ChatBody(_OpenAiBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
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

    prompt: str | None = Field(default=None, max_length=65_536)
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
