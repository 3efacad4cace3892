"""What a run is asked to do: one tree of strict specifications, one default per value.

YAML in, YAML out; unknown keys and impossible values are refused, all of them in one message.
The command line overrides single values by their dotted names (`adapter.rank`). Nothing here
imports torch, touches the disk beyond the YAML file, or probes the machine.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticKnownError

from swlora.errors import UserError
from swlora.layer_policy import LayerPolicy, parse_policy
from swlora.settings import explain, flag_name

DEFAULT_MODEL = "openai-community/gpt2"
BUILTIN_MODEL = "builtin"
DEFAULT_DATASET = "tuetschek/e2e_nlg"
SAMPLE_DATASET = "sample"
DEFAULT_BATCH_SIZE = 32


def split_list(value: object) -> object:
    """Turn `"a,b"` or `["a,b", "c"]` into `["a", "b", "c"]`; leave other types alone."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        items: list[object] = []
        for item in value:
            items.extend(part.strip() for part in item.split(",")) if isinstance(
                item, str
            ) else items.append(item)
        return [item for item in items if item != ""]
    return value


def join_list(value: object) -> object:
    """Turn `[2, 11]`, `["2", "11"]` or 2 into "2,11" or "2"; leave other types alone."""
    items = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(item, int | str) for item in items):
        return ",".join(map(str, items))
    return value


NameList = Annotated[list[str], BeforeValidator(split_list)]


def one_or_many(value: object) -> object:
    """Turn `"a, b"` into `["a, b"]`; leave lists alone."""
    return [value] if isinstance(value, str) else value


PromptList = Annotated[
    list[Annotated[str, StringConstraints(min_length=1)]], BeforeValidator(one_or_many)
]


def read_policy(value: object) -> LayerPolicy:
    """Return the layer policy that a text is; ValueError where it is none."""
    if isinstance(value, LayerPolicy):
        return value
    if not isinstance(value, str):
        raise PydanticKnownError("string_type")
    try:
        return parse_policy(value)
    except UserError as error:
        raise ValueError(str(error)) from error


Layers = Annotated[
    LayerPolicy, PlainValidator(read_policy), PlainSerializer(str), BeforeValidator(join_list)
]


def checked_device(value: str) -> str:
    """Return the name of a device; ValueError where there is no such kind."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", value, re.ASCII):
        raise ValueError(f"must be auto, cpu, cuda, cuda:N or mps, not {value!r}")
    return value


class Spec(BaseModel):
    """Base of all specifications: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    device: Annotated[str, AfterValidator(checked_device)] = Field(
        default="auto", description="auto, cpu, cuda, cuda:N or mps"
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads [default: the cores that other programs leave free]",
    )


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
    skip_bad_rows: bool = False
    truncate: bool = Field(default=False, description="cut over-long rows instead of refusing them")


MethodName = Literal["lora", "lora+", "dora", "adalora", "pissa", "rslora", "full", "supertuning"]
LORA_SETTINGS = frozenset({"rank", "alpha", "dropout"})
METHOD_SETTINGS: dict[MethodName, frozenset[str]] = {  # those of the others: LORA_SETTINGS
    "lora+": LORA_SETTINGS | {"lora_plus_ratio"},
    "full": frozenset(),
    "supertuning": frozenset({"sparsity"}),
}


class AdapterSpec(Spec):
    """The adapter: method, size, and where in the model it sits."""

    method: MethodName = Field(default="lora", description=", ".join(get_args(MethodName)))
    rank: int = Field(default=4, ge=1, le=4096, description="adalora: the mean in the end")
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_plus_ratio: float | None = Field(
        default=None, ge=1, description="lora+: B's learning rate over A's [default: 16]"
    )
    sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="supertuning: share left frozen [default: 0.99]"
    )
    targets: NameList = Field(default_factory=lambda: ["all-linear"], min_length=1)
    layers: Layers = Field(
        default=parse_policy("all"),
        description="all, super (found and proved first), super+removal, auto:0.5 (half of the "
        "time, or all where a trial finds that worse), last:4, first:4, every:4 (evenly spaced), "
        "random:4:SEED, 2,11",
    )

    @model_validator(mode="after")
    def _takes_its_settings(self) -> Self:
        taken = METHOD_SETTINGS.get(self.method, LORA_SETTINGS)
        known = LORA_SETTINGS.union(*METHOD_SETTINGS.values())
        given = {n for n, f in AdapterSpec.model_fields.items() if getattr(self, n) != f.default}
        ignored = sorted(given & (known - taken))
        if ignored:
            flags = ", no ".join(flag_name(f"adapter.{name}") for name in ignored)
            raise ValueError(f"--method {self.method} has no {flags}; leave that out")
        return self


class TrainSpec(Spec):
    """The optimisation."""

    epochs: int = Field(default=1, ge=1)
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="data-set rows per optimizer step "
        f"[default: {DEFAULT_BATCH_SIZE}, fewer where that makes less than 20 steps]",
    )
    learning_rate: float = Field(default=2e-3, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    max_steps: int | None = Field(default=None, ge=1, description="stop the schedule after N steps")
    engine: Literal["auto", "tree", "plain"] = Field(
        default="auto", description="tree: same gradient, less work; plain: padded batches"
    )
    order: Literal["prompts", "neighbours", "iid"] = Field(
        default="prompts", description="what shares a step: a prompt's rows, also like prompts, any"
    )
    row_tokens: int = Field(default=4096, ge=64, description="tokens that are run at once")
    cache_gb: float = Field(
        default=8.0, ge=0, description="disk for states below the lowest adapted layer; 0: none"
    )
    checkpoint_every_s: float = Field(
        default=300.0, gt=0, description="seconds between checkpoints"
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

    @model_validator(mode="after")
    def _held_out_rows_are_measured(self) -> Self:
        for name in ("eval_rows", "early_stopping"):
            if getattr(self, name) is not None and self.eval_every_steps == 0:
                flag = flag_name(f"train.{name}")
                raise ValueError(
                    f"{flag} needs held-out losses; --eval-every-steps 0 measures none"
                )
        return self


class DecodeSpec(Spec):
    """How text is generated."""

    batch_size: int = Field(default=96, ge=1, description="rows at once, a prompt's beams counted")
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


class IdentifySpec(Spec):
    """How super weights are looked for."""

    prompt: PromptList = Field(
        default_factory=list, description="text to search with; may be repeated [default: several]"
    )
    max_candidates: int = Field(default=8, ge=1, le=64)
    controls: int = Field(
        default=20, ge=1, le=1000, description="other weights zeroed to compare, for each candidate"
    )
    text: Path | None = Field(
        None, description="plain text for perplexity; default: the shipped one"
    )
    windows: int = Field(
        default=4, ge=1, description="windows of text whose perplexity is measured"
    )
    window_tokens: int = Field(default=512, ge=16)


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


class RunSpec(Spec):
    """Everything one run needs."""

    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    adapter: AdapterSpec = AdapterSpec()
    train: TrainSpec = TrainSpec()
    decode: DecodeSpec = DecodeSpec()
    identify: IdentifySpec = IdentifySpec()
    serve: ServeSpec = Field(default=ServeSpec(), exclude=True)  # no part of what a run computes
    seed: int = Field(default=0, ge=0, lt=2**32)


def load_spec(path: Path | None, overrides: dict[str, Any]) -> RunSpec:
    """Build a `RunSpec` from a YAML file and dotted overrides; an override of None is no override.

    Raises UserError with all problems in one line.
    """
    tree = {} if path is None else read_mapping(path)
    flags = [dotted for dotted, value in overrides.items() if value is not None]
    for dotted in flags:
        set_dotted(tree, dotted, overrides[dotted])
    try:
        return RunSpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, RunSpec, path, flags)) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, without its empty sections; UserError otherwise."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        place = f", line {at.line + 1}, column {at.column + 1}" if at else ""
        detail = " ".join(str(error.problem or error.context).split())
        raise UserError(f"{path}{place} is not valid YAML: {detail}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {detail}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping such as 'adapter: {{rank: 4}}'")
    return {key: value for key, value in tree.items() if value is not None}


def dump_yaml(spec: BaseModel) -> str:
    """Write a specification as YAML that `load_spec` reads back to an equal one."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def set_dotted(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set the value of a dotted name such as `adapter.rank` in a tree of mappings."""
    *sections, last = dotted.split(".")
    for key in sections:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f"'{key}' must be a mapping in the configuration")
        tree = child
    tree[last] = value
