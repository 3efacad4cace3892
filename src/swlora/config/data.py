"""The section `data`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from swlora.config.fields import Spec

DEFAULT_DATASET = "tuetschek/e2e_nlg"
SAMPLE_DATASET = "sample"


class DataSpec(Spec):
    """Which rows are trained on and which are generated for."""

    name: str = Field(
        default=DEFAULT_DATASET,
        min_length=1,
        description="Hub id, folder, file or sample (offline, the default is sample)",
    )
    eval_file: Path | None = Field(
        default=None, description="rows to evaluate on, for JSONL or CSV data"
    )
    eval_split: Literal["dev", "test"] = "dev"
    train_rows: int | None = Field(
        default=None, ge=1, description="use the first N training rows only"
    )
    train_prompts: int | None = Field(
        default=None,
        ge=1,
        description="use the rows of the first N distinct training prompts only: they share work",
    )
    eval_prompts: int | None = Field(
        None, ge=1, description="use the first N distinct prompts only"
    )
    english: bool | None = Field(
        default=None,
        description="also measure perplexity of English text, to see what was forgotten "
        "[default: with E2E data and the sample]",
    )
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    train_on: Literal["all-turns", "last-turn"] = Field(
        default="all-turns", description="of chats, train every answer or the last one"
    )
    skip_bad_rows: bool = False
    truncate: bool = Field(default=False, description="cut over-long rows instead of refusing them")
