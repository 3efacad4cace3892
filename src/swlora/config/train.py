"""The section `train`."""

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from swlora.config.adapter import METHOD_NAMES
from swlora.config.fields import PromptList, Spec, split_list
from swlora.config.rates import DEFAULT_RATE, RATES
from swlora.config.save_every import SaveEvery, parse_save_every
from swlora.settings import flag_name

DEFAULT_BATCH_SIZE = 16
EARLIER_BATCH_SIZE = 32  # of runs that do not note what they were begun with
FEW_STEPS = 20  # fewer hardly train anything
FEW_ROWS, PASSES = 2000, 3  # of fewer rows a training makes so many passes
DEFAULT_SAVE_EVERY = "5min"
SAY_THE_SAME = {"train.save_every": "train.checkpoint_every_s"}  # one of the two at most
TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
TRACKERS: tuple[str, ...] = get_args(TrackerName)
TrackerNames = Annotated[
    list[TrackerName],
    BeforeValidator(split_list, json_schema_input_type=str | list[TrackerName]),
]
OF_HELD_OUT = ("eval_rows", "early_stopping", "sample_prompts")  # settings that need its losses


class TrainSpec(Spec):
    """The optimisation."""

    epochs: int | None = Field(
        default=None,
        ge=1,
        description="passes over the training rows "
        f"[default: {PASSES} where there are fewer than {FEW_ROWS:,}, else 1]",
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="examples per optimizer step "
        f"[default: {DEFAULT_BATCH_SIZE}, fewer where that makes less than {FEW_STEPS} steps]",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="higher in few layers "
        f"[default: {', '.join(f'{m} {RATES.get(m, DEFAULT_RATE):g}' for m in METHOD_NAMES)}]",
    )
    find_learning_rate: bool = Field(
        default=False,
        description="try rates in short trainings first, and take what they foresee as the best",
    )
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    max_steps: int | None = Field(default=None, ge=1, description="stop the schedule after N steps")
    engine: Literal["auto", "tree", "plain"] = Field(
        default="auto", description="tree: same gradient, less work; plain: padded batches"
    )
    order: Literal["prompts", "pairs", "neighbours", "iid"] = Field(
        default="prompts",
        description="what shares a step: a prompt's examples, two of a prompt, also like prompts, "
        "any",
    )
    row_tokens: int = Field(default=4096, ge=64, description="tokens that are run at once")
    cache_gb: float = Field(
        default=8.0,
        ge=0,
        description="disk, where it is free, for states below the lowest adapted layer; 0: none",
    )
    save_every: str | None = Field(
        default=None,
        description="how often a checkpoint is written, such as 500steps or 30s [default: 5min]",
    )
    checkpoint_every_s: float | None = Field(
        default=None, gt=0, description="the same as a number of seconds"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="how many are kept; a run goes on from the newest whole one"
    )
    eval_every_steps: int | None = Field(
        default=None,
        ge=0,
        description="measure the loss on held-out rows every N steps and keep the best adapter; "
        "0: never [default: a few times, on few rows]",
    )
    eval_rows: int | None = Field(
        default=None,
        ge=1,
        description="measure it on the first N rows of --split [default: all with "
        "--eval-every-steps, else few]",
    )
    early_stopping: int | None = Field(
        default=None,
        ge=1,
        description="stop when N measurements of the held-out loss in a row were no better; keep "
        "the best adapter",
    )
    report_to: TrackerNames = Field(
        default_factory=list,
        description="trackers that are sent settings, losses and rates: tensorboard, trackio "
        "(local, both in swlora[track]), wandb, mlflow",
    )
    project: str | None = Field(
        default=None,
        min_length=1,
        description="the project in the trackers of --report-to [default: swlora]",
    )
    sample_prompts: PromptList = Field(
        default_factory=list,
        description="prompts that are continued (of chats: answered) at every measurement of the "
        "held-out loss, greedily: a text, which may be repeated, or a file with one on each line",
    )
    sample_every: int = Field(
        default=1, ge=1, description="with --sample-prompts: at every N-th measurement only"
    )
    sample_tokens: int = Field(
        default=64, ge=1, le=4096, description="with --sample-prompts: new tokens at most"
    )
    shard: bool = Field(
        default=False,
        description="divide the model's frozen weights over the processes that torchrun started "
        "(FSDP2), for models that do not fit one device",
    )
    on_nonfinite: str = Field(
        default="stop",
        description="what to do where the loss of a step or its gradient is not finite: stop, or "
        "skip:N, leave the weights as they are in N steps of the training at most",
    )

    @property
    def rate(self) -> float:
        """The learning rate; LoRA's default where it is still open."""
        return DEFAULT_RATE if self.learning_rate is None else self.learning_rate

    @property
    def skippable_steps(self) -> int:
        """How many steps without a finite loss or gradient are passed over."""
        return int(self.on_nonfinite.partition(":")[2] or 0)

    @property
    def asked_of_held_out(self) -> list[str]:
        """The settings that were given and need held-out losses, in their order."""
        return [name for name in OF_HELD_OUT if getattr(self, name) not in (None, [])]

    @property
    def saving(self) -> SaveEvery:
        """How often a checkpoint is written."""
        if self.checkpoint_every_s is not None:
            return SaveEvery(seconds=self.checkpoint_every_s)
        return parse_save_every(self.save_every or DEFAULT_SAVE_EVERY)

    @field_validator("on_nonfinite")
    @classmethod
    def _stops_or_skips(cls, text: str) -> str:
        if not re.fullmatch(r"stop|skip:[1-9]\d{0,8}", text, re.ASCII):
            raise ValueError(f"{text!r} is neither stop nor skip:N, such as skip:3")
        return text

    @field_validator("save_every")
    @classmethod
    def _says_how_often(cls, text: str | None) -> str | None:
        if text is not None:
            parse_save_every(text)
        return text

    @model_validator(mode="after")
    def _samples_need_whole_weights(self) -> Self:
        if self.shard and self.sample_prompts:
            raise ValueError("--sample-prompts needs whole weights; with --shard, leave it out")
        return self

    @model_validator(mode="after")
    def _one_says_how_often_to_save(self) -> Self:
        if self.save_every is not None and self.checkpoint_every_s is not None:
            raise ValueError(
                "--save-every and --checkpoint-every-s say the same; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _held_out_rows_are_measured(self) -> Self:
        if self.eval_every_steps == 0 and (asked := self.asked_of_held_out):
            flag = flag_name(f"train.{asked[0]}")
            raise ValueError(f"{flag} needs held-out losses; --eval-every-steps 0 measures none")
        return self
