"""The section `serve`."""

from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator

from swlora.config.fields import NameList, Spec


class ServeSpec(Spec):
    """The web page and the API: where they listen, what they offer, how much they take on."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="0 takes a free one")
    runs: Path = Field(
        default=Path("runs"), description="run folders: their adapters and findings are offered"
    )
    dataset: str | None = Field(
        default=None, min_length=1, description="E2E data whose references are shown"
    )
    queue: int = Field(default=32, ge=1, le=10_000, description="requests that may wait")
    max_rows: int = Field(default=32, ge=1, le=256, description="texts written at the same time")
    cache_gb: float = Field(default=2.0, gt=0, description="memory for texts that are written")
    deadline_s: float = Field(default=60.0, gt=0, le=3600, description="seconds a request may take")
    max_tokens: int = Field(default=1024, ge=1, description="new tokens a request may ask for")
    api_key: SecretStr | None = Field(
        default=None, description="asked of every client [default: SWLORA_API_KEY]"
    )
    allowed_hosts: NameList = Field(
        default_factory=list, description="names by which clients call this server"
    )
    cors_origins: NameList = Field(
        default_factory=list, description="other web sites that may call the API"
    )
    allow_training: bool = Field(
        default=False,
        description="let the page start trainings, of data in --data-folder, into --runs",
    )
    data_folder: Path | None = Field(
        default=None, description="with --allow-training: the only folder whose data are offered"
    )

    @model_validator(mode="after")
    def _training_has_its_data(self) -> Self:
        if self.allow_training and self.data_folder is None:
            raise ValueError("--allow-training needs --data-folder, which holds the data files")
        if self.data_folder is not None and not self.allow_training:
            raise ValueError("--data-folder is for trainings from the page: add --allow-training")
        return self
