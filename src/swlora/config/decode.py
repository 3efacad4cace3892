"""The section `decode`."""

from typing import Self

from pydantic import Field, model_validator

from swlora.config.fields import Spec


class DecodeSpec(Spec):
    """How text is generated."""

    batch_size: int = Field(default=96, ge=1, description="texts at once, a prompt's beams counted")
    max_new_tokens: int = Field(default=96, ge=1)
    num_beams: int = Field(default=1, ge=1, le=64)
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.0, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _no_sampled_beams(self) -> Self:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("--num-beams above 1 needs --temperature 0: beams are not sampled")
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise ValueError("--length-penalty ranks beams: it needs --num-beams above 1")
        return self
