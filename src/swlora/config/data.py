"""The section `data`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from swlora.config.fields import NameList, Spec

DEFAULT_DATASET = "tuetschek/e2e_nlg"
SAMPLE_DATASET = "sample"
# Of the forms in which examples are written (data.forms)
FIELDS = (
    *("prompt", "completion", "messages", "tools", "conversations"),
    *("instruction", "input", "output", "system", "text"),
)


class DataSpec(Spec):
    """Which rows are trained on and which are generated for."""

    name: str = Field(
        default=DEFAULT_DATASET,
        min_length=1,
        description="file, folder or pattern of files, Hub id, or sample (offline, the default is "
        "sample)",
    )
    eval_file: Path | None = Field(
        default=None, description="rows to evaluate on, for files and data of the Hub"
    )
    eval_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the prompts to hold out, where there is no dev split [default: 0.05]",
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
    train_split: str = Field(
        default="train", min_length=1, description="the split to train on, of data of the Hub"
    )
    config_name: str | None = Field(default=None, description="the configuration, of the Hub's")
    dataset_revision: str | None = Field(
        default=None, description="branch, tag or commit, of the Hub's"
    )
    columns: NameList = Field(
        default_factory=list,
        description="columns that have other names, such as prompt=question,completion=answer "
        "(fields: prompt, completion; messages; conversations; instruction, input, output; text)",
    )
    prompt_column: str = Field(default="prompt", description="same as --columns prompt=...")
    completion_column: str = Field(
        default="completion", description="same as --columns completion=..."
    )
    train_on: Literal["all-turns", "last-turn"] = Field(
        default="all-turns", description="of chats, train every answer or the last one"
    )
    skip_bad_rows: bool = False
    truncate: bool = Field(
        default=False, description="shorten long rows: a chat's oldest turns, a prompt's middle"
    )

    @property
    def named_columns(self) -> dict[str, str]:
        """The columns of fields that have other names, by field."""
        named = dict(entry.split("=", 1) for entry in self.columns)
        for field in ("prompt", "completion"):
            if (column := getattr(self, f"{field}_column")) != field:
                named[field] = column
        return named

    @field_validator("columns")
    @classmethod
    def _name_fields(cls, columns: list[str]) -> list[str]:
        for entry in columns:
            field, sign, column = entry.partition("=")
            if not sign or not column or field not in FIELDS:
                raise ValueError(f"{entry!r} is not FIELD=COLUMN with one of {', '.join(FIELDS)}")
        for side, what in ((0, "field"), (2, "column")):
            names = [entry.partition("=")[side] for entry in columns]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"the {what} {twice!r} is named twice")
        return columns

    @model_validator(mode="after")
    def _name_columns_once(self) -> Self:
        for field in ("prompt", "completion"):
            flag = getattr(self, f"{field}_column")
            named = next((e for e in self.columns if e.startswith(f"{field}=")), None)
            if flag != field and named not in (None, f"{field}={flag}"):
                raise ValueError(f"--columns {named} and --{field}-column {flag} disagree")
        return self
