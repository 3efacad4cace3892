"""The section `identify`."""

from pydantic import Field

from swlora.config.fields import HomePath, PromptList, Spec


class IdentifySpec(Spec):
    """How super weights are looked for."""

    prompt: PromptList = Field(
        default_factory=list, description="text to search with; may be repeated [default: several]"
    )
    max_candidates: int = Field(default=8, ge=1, le=64)
    controls: int = Field(
        default=20, ge=1, le=1000, description="other weights zeroed to compare, for each candidate"
    )
    text: HomePath | None = Field(
        None, description="plain text for perplexity; default: the shipped one"
    )
    windows: int = Field(
        default=4, ge=1, description="windows of text whose perplexity is measured"
    )
    window_tokens: int = Field(default=512, ge=16)
    deep: bool = Field(
        default=False,
        description="of proved weights also: text at every dose, and int8 and int4 rounding with "
        "and without them held out; takes about twice as long",
    )
