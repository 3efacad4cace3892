"""Which settings each command takes, on the command line and in Python; all others are refused."""

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from swlora.config import RunSpec
from swlora.errors import UserError
from swlora.processes import world
from swlora.settings import flag_name


def section_class(name: str) -> type[BaseModel]:
    """Return the specification of a section such as "model"."""
    section = RunSpec.model_fields[name].annotation
    assert isinstance(section, type) and issubclass(section, BaseModel)
    return section


def setting_field(path: str) -> FieldInfo:
    """Return the field of a setting such as "model.name" or "seed"."""
    group, _, name = path.partition(".")
    return section_class(group).model_fields[name] if name else RunSpec.model_fields[path]


def keyword(path: str) -> str:
    """Return the keyword argument of Python for a setting, such as dataset for data.name."""
    return flag_name(path).removeprefix("--").replace("-", "_")


def _settings(section: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in section_class(section).model_fields)


MODEL = _settings("model")
EVALUATION = ("data.english",)
DATA = tuple(name for name in _settings("data") if name not in EVALUATION)
LIMITS = ("data.train_rows", "data.train_prompts")  # of what is trained on
EVAL_DATA = tuple(name for name in DATA if name not in LIMITS)
IDENTIFY, ADAPTER = _settings("identify"), _settings("adapter")
TRAIN, DECODE = _settings("train"), _settings("decode")
TEXT = tuple(name for name in DECODE if name != "decode.batch_size")  # of a single prompt
CHAT = ("decode.temperature", "decode.top_p", "decode.max_new_tokens")
SERVE = _settings("serve")
SEED = ("seed",)
TOKENIZER = ("model.name", "model.tokenizer", "model.revision")
OF_A_FILE = tuple(  # which rows there are, and how they are read
    f"data.{name}"
    for name in ("name", "eval_file", "columns", "config_name", "dataset_revision", "train_split")
)
STEPS = tuple(
    f"train.{name}" for name in ("epochs", "batch_size", "max_steps", "order", "row_tokens")
)
# Commands that several processes do together
SHARED = frozenset({"identify", "train", "eval", "train-eval"})

SETTINGS = {
    "identify": (*MODEL, *IDENTIFY, *SEED),
    "train": (*MODEL, *DATA, *ADAPTER, *TRAIN, *IDENTIFY, *SEED),
    "init": (*TOKENIZER, *OF_A_FILE),
    "data": (*TOKENIZER, *DATA, *STEPS, *SEED),
    "eval": (*MODEL, *EVAL_DATA, *EVALUATION, *DECODE, *SEED),
    "train-eval": (
        *(*MODEL, *DATA, *EVALUATION, *ADAPTER),
        *(*(name for name in TRAIN if name != "train.shard"), *DECODE, *IDENTIFY, *SEED),
    ),
    "generate": (*MODEL, *TEXT, *SEED),
    "merge": TOKENIZER,
    "chat": (*MODEL, *CHAT, *SEED),
    "serve": (*MODEL, *SERVE),
    "export": (*TOKENIZER, "model.threads"),
}


def check_processes(command: str) -> None:
    """Raise UserError where a launcher started several processes of a command for a single one."""
    if command not in SHARED and (n := world().size) > 1:
        raise UserError(
            f"swlora {command} works in one process, and the launcher started {n}: start it "
            f"without one (those for several: {', '.join(sorted(SHARED))})"
        )
