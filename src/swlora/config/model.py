"""The section `model`."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field

from swlora.config.fields import Spec

DEFAULT_MODEL = "openai-community/gpt2"
BUILTIN_MODEL = "builtin"


def checked_device(value: str) -> str:
    """Return the name of a device; ValueError where there is no such kind."""
    if value == "mps":
        raise ValueError("Apple's GPU has no float64, in which losses are summed; use cpu")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value, re.ASCII):
        raise ValueError(f"must be auto, cpu, cuda or cuda:N, not {value!r}")
    return value


KEPT_ABOVE_BYTES = 1_000_000_000  # the size above which a .gguf file stays as it lies


class ModelSpec(Spec):
    """Which language model, and how it is held in memory."""

    name: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        description="Hub id, folder, .gguf or builtin (offline, the default is builtin)",
    )
    tokenizer: str | None = Field(
        default=None, min_length=1, description="Hub id or folder, where it is not the model's"
    )
    revision: str | None = Field(
        default=None, min_length=1, description="commit, tag or branch on the Hub"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    frozen: Literal["gguf", "dequantised"] | None = Field(
        default=None,
        description="weights of a .gguf file: gguf: as they lie in it, mapped; dequantised "
        "[default: gguf above 1 GB]",
    )
    device: Annotated[str, AfterValidator(checked_device)] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N"
    )
    memory_gb: float | None = Field(
        default=None,
        ge=0,
        description="memory beside the weights: for the steps of a training, which are run in "
        "smaller parts where they need more, and for copies of weights, which make products "
        "faster; 0: no copies [default: three quarters of what is free, of which copies get "
        "few or none where steps run many tokens at once]",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads [default: the cores that other programs leave free]",
    )

    @property
    def searchable(self) -> Self:
        """The model as a search for super weights takes it, which sets single weights to zero.

        Weights of a .gguf file are dequantised for it, unless something else was asked for.
        """
        if self.frozen is not None or not self.name.endswith(".gguf"):
            return self
        return self.model_copy(update={"frozen": "dequantised"})
