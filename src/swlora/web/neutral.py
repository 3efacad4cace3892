"""Fields of the OpenAI API that this server takes only in the values that change no answer.

Clients send many of them as they are by default. Every other value is refused by name, in one line
that says which values are taken; null is the same as leaving a field out.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)


class Body(BaseModel):
    """Base of all request bodies: strict, unknown fields refused, null means left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = cls.model_fields
        return {name: v for name, v in given.items() if v is not None or name not in known}


def refused_with(message: str) -> WrapValidator:
    """Refuse what the type does with this message, instead of pydantic's for each alternative."""

    def check(value: Any, accepted: ValidatorFunctionWrapHandler) -> Any:
        try:
            return accepted(value)
        except ValidationError:
            raise ValueError(message) from None

    return WrapValidator(check)


def only(values: str) -> WrapValidator:
    """Name the values that are accepted."""
    return refused_with(f"only {values} is accepted")


Nothing = Annotated[None, only("null")]
ShortText = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[ShortText, ShortText], Field(max_length=16)]


class Neutral(Body):
    """What both routes take without effect: nothing is stored, billed or recognised here."""

    user: ShortText = ""
    safety_identifier: ShortText = ""
    prompt_cache_key: ShortText = ""
    store: bool = False
    metadata: Annotated[
        Metadata, refused_with("at most 16 texts by name, of 512 characters each")
    ] = Field(default_factory=dict)
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority"],
        only("one of auto, default, flex, scale and priority"),
    ] = "auto"
    logit_bias: Annotated[dict[str, Any], Field(max_length=0), only("null or {}")] = Field(
        default_factory=dict
    )


class TextFormat(Body):
    """The only format of an answer."""

    type: Literal["text"]


NoTools = Annotated[list[Any], Field(max_length=0), only("null or []")]
NoChoice = Annotated[Literal["none", "auto"], only("null, none or auto")]


class NeutralChat(Neutral):
    """What a chat takes without effect: there are no tools, and answers are text."""

    response_format: Annotated[TextFormat, only('null or {"type": "text"}')] = TextFormat(
        type="text"
    )
    tools: NoTools = Field(default_factory=list)
    tool_choice: NoChoice = "none"
    parallel_tool_calls: bool = True
    functions: NoTools = Field(default_factory=list)
    function_call: NoChoice = "none"
    modalities: Annotated[list[Literal["text"]], Field(max_length=1), only('null or ["text"]')] = (
        Field(default_factory=list)
    )
    audio: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Nothing = None
    verbosity: Nothing = None
    web_search_options: Nothing = None


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


Role = Literal["system", "developer", "user", "assistant", "tool"]
MAX_CHARACTERS = 65_536
Parts = Annotated[list[TextPart], Field(max_length=256)]


class Message(Body):
    """One turn of a chat. A `name` or a call's id is no part of what a template writes."""

    role: Annotated[
        Role,
        refused_with(f"a role is one of {', '.join(get_args(Role))}"),
    ]
    content: Annotated[
        str | Parts,
        refused_with('a text or a list of parts {"type": "text", "text": ...} is needed'),
    ] = ""
    name: ShortText = ""
    tool_call_id: ShortText = ""
    refusal: Nothing = None
    tool_calls: NoTools = Field(default_factory=list)
    function_call: Nothing = None
    audio: Nothing = None
    annotations: NoTools = Field(default_factory=list)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError("content is needed: only an assistant's may be null")
        if len(self.text) > MAX_CHARACTERS:
            raise ValueError(f"content may have {MAX_CHARACTERS} characters")
        return self

    @property
    def text(self) -> str:
        """The content; nothing is put between its parts."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)
