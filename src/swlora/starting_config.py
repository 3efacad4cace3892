"""A configuration to start from, written for a model and its data, with the reason of each value.

Values are those that a training would take by itself where that is enough; they stand there to be
changed. Of the model only tokenizer and configuration are read, of the data all rows.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from swlora.command_settings import OF_A_FILE
from swlora.config import DEFAULT_RATE, RunSpec, TrainSpec
from swlora.config_schema import run_schema
from swlora.errors import UserError
from swlora.files import check_writable, write_text
from swlora.job import Job
from swlora.models.load import settled_model
from swlora.plural import counted
from swlora.preview import DataPreview, lenient_job, preview_of
from swlora.progress import Progress
from swlora.result_json import NO_KEY

PATIENCE = 3
STEP_OF_TOKENS, FEW_TOKENS = 16, 32
SCHEMA = "swlora.schema.json"


@dataclass(frozen=True)
class Setting:
    """A value of a section, and why it is that one; `is_hint`: written as a comment."""

    section: str
    name: str
    value: Any
    why: str
    is_hint: bool = False


@dataclass(frozen=True)
class StartingConfig:
    """What was written where; `settings` are what was chosen, by dotted names.

    `command` is the one that it is for.
    """

    file: Path
    schema: Path | None
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = field(default="train-eval", metadata=NO_KEY)


def write_starting_config(
    path: Path, spec: RunSpec, progress: Progress, *, force: bool = False, schema: bool = False
) -> StartingConfig:
    """Look at the model and the data of `spec`, and write a commented YAML file for them.

    `schema` also writes the schema for editors beside it. Raises UserError for a file that is
    there, unless `force`, and what a training raises for model and data.
    """
    beside = path.parent / SCHEMA if schema else None
    for target in filter(None, (path, beside)):
        if target.exists() and not force:
            raise UserError(f"{target} is there already; --force writes over it")
    check_writable(path.parent, str(path))
    job = lenient_job(spec, progress)
    found = preview_of(job, spec, 0)
    chosen = chosen_settings(
        spec, found, longest_prompt_tokens(job) if found.summary.held_out else 0
    )
    command = "train-eval" if found.summary.held_out else "train"
    write_text(path, as_yaml(chosen, path, command, schema=schema))
    if beside:
        write_text(beside, json.dumps(run_schema(), indent=1) + "\n")
    values = {f"{s.section}.{s.name}": s.value for s in chosen if not s.is_hint}
    return StartingConfig(path, beside, values, command)


def chosen_settings(spec: RunSpec, found: DataPreview, prompt_tokens: int) -> list[Setting]:
    """Choose values for a model and its data, as they were found.

    `prompt_tokens` are those of the longest prompt that is generated for; 0 for none.
    """
    answers = _answers(found, prompt_tokens)
    train, held_out, steps = found.summary.train, found.summary.held_out, found.summary.steps
    n_rows = train.n_rows
    sized, n_steps = _steps(train.n_sequences)
    epochs, batch = sized.epochs or 1, sized.batch_size
    settings = [
        Setting("model", "name", settled_model(spec.model).name, found.model),
        *(
            Setting("model", name, value, "as it was named")
            for name in ("tokenizer", "revision")
            if (value := getattr(spec.model, name)) is not None
        ),
        Setting(
            "model", "dtype", "auto", "bfloat16 where the processor multiplies it, else float32"
        ),
        Setting("data", "name", spec.data.name, f"{counted(n_rows, 'row')} to train on"),
        *_data_settings(spec, found, answers),
        Setting("adapter", "method", "lora", "dora, rslora, pissa, lora+, adalora are others"),
        Setting("adapter", "rank", 4, "enough for one task; 16 or more where it is a wide one"),
        Setting(
            "adapter",
            "layers",
            "all",
            "the best scores; last:4, or auto:0.5 for half of the time, are faster",
        ),
        Setting("train", "epochs", epochs, _why_epochs(epochs, n_rows)),
        Setting("train", "batch_size", batch, f"rows a step: {counted(n_steps, 'step')} in all"),
        Setting(
            "train",
            "learning_rate",
            DEFAULT_RATE,
            "of lora in all layers; without it, what suits method and layers",
            is_hint=True,
        ),
    ]
    if steps is not None and steps.ideal_ratio > 1.05:
        why = f"rows of a prompt share a step: {steps.ideal_ratio:.1f} times fewer tokens to run"
        settings.append(Setting("train", "order", "prompts", why))
    settings += _watching(held_out is not None, epochs)
    settings.append(Setting("decode", "max_new_tokens", answers.n_tokens, answers.why))
    return settings


@dataclass(frozen=True)
class _Answers:
    """How many tokens of a generated text there is room for; `cut` says which prompts are cut."""

    n_tokens: int
    why: str
    cut: str = ""


def _data_settings(spec: RunSpec, found: DataPreview, answers: _Answers) -> list[Setting]:
    data, summary = spec.data, found.summary
    settings = []
    for name in (setting.removeprefix("data.") for setting in OF_A_FILE[1:]):
        if name in data.model_fields_set and (value := getattr(data, name)):
            shown = value if isinstance(value, list) else str(value)
            settings.append(Setting("data", name, shown, "as it was named"))
    splits = [split for split in (summary.train, summary.held_out) if split]
    if n_cut := sum(split.n_cut for split in splits):
        why = (
            f"longer than the context of {summary.train.context_tokens:,}: {counted(n_cut, 'row')}"
        )
        settings.append(Setting("data", "truncate", True, why))
    elif answers.cut:
        settings.append(Setting("data", "truncate", True, answers.cut))
    if n_bad := sum(summary.bad_rows.values()):
        why = f"{counted(n_bad, 'row')} cannot be used: {', '.join(list(summary.bad_rows)[:3])}"
        settings.append(Setting("data", "skip_bad_rows", True, why))
    if summary.held_out is not None and data.eval_file is None:
        why = f"without training on them: {counted(summary.held_out.n_rows, 'row')}"
        settings.append(Setting("data", "eval_split", data.eval_split, why))
    return settings


def _why_epochs(epochs: int, n_rows: int) -> str:
    if epochs > 1:
        return f"passes over the data, which are few ({counted(n_rows, 'row')})"
    return f"one pass over {counted(n_rows, 'row')}; more may still help"


def _steps(n_sequences: int) -> tuple[TrainSpec, int]:
    """Return what a training fits to its data, and its steps."""
    from swlora.training.schedule import fitted, planned_steps

    return fitted(TrainSpec(), n_sequences), planned_steps(TrainSpec(), n_sequences)


def _watching(has_held_out: bool, epochs: int) -> list[Setting]:
    if not has_held_out:
        why = "there are no held-out rows: nothing is measured while it trains"
        return [Setting("train", "eval_every_steps", 0, why)]
    tell = "shows what it says to a prompt, at every measurement"
    prompt = Setting("train", "sample_prompts", ["a prompt of yours"], tell, is_hint=True)
    board = Setting("train", "report_to", ["tensorboard"], "pip install 'swlora[track]'", True)
    if epochs == 1:
        return [prompt, board]
    why = "ends where so many held-out losses in a row are no better; best/ keeps the best"
    return [Setting("train", "early_stopping", PATIENCE, why), prompt, board]


def _answers(found: DataPreview, prompt_tokens: int) -> _Answers:
    """Return room for nearly every trained text that the context has beside the prompts.

    The longest prompt is whole, unless it leaves next to nothing, or rows are cut anyway.
    """
    longest = max(found.trained_p99_tokens, 1)
    wanted = int(np.clip(-(-longest // STEP_OF_TOKENS) * STEP_OF_TOKENS, FEW_TOKENS, 1024))
    train, held_out = found.summary.train, found.summary.held_out
    context, is_cut = train.context_tokens, train.n_cut or (held_out and held_out.n_cut)
    half, room = max(1, context // 2), context - prompt_tokens
    if wanted <= (half if is_cut or not prompt_tokens else room):
        return _Answers(wanted, "of a text in eval: nearly every trained one is that short")
    if is_cut or not prompt_tokens:
        return _Answers(half, f"of a text in eval: half of the context of {context:,}")
    if room >= min(FEW_TOKENS, half):
        why = f"of a text in eval: the longest prompt leaves no more of the context of {context:,}"
        return _Answers(room, why)
    few = min(FEW_TOKENS, half)
    cut = f"a prompt of {counted(prompt_tokens, 'token')} leaves no room for an answer"
    return _Answers(few, f"of a text in eval: few, in a context of {context:,}", cut)


def longest_prompt_tokens(job: Job) -> int:
    """Return the tokens of the longest prompt that an evaluation continues; 0 where none is."""
    from swlora.data.dataset import asked_of
    from swlora.data.encode import encode_prompts

    split, dataset = job.spec.data.eval_split, job.dataset
    asked = asked_of(dataset.split(split), job.encoded(split).example_ids).examples
    if not asked:
        return 0
    return max(map(len, encode_prompts(asked, dataset.separator, job.loaded.tokenizer)))


def as_yaml(settings: Sequence[Setting], path: Path, command: str, *, schema: bool = False) -> str:
    """Write settings of a command by their sections, each with its reason behind it."""
    lines = [f"# yaml-language-server: $schema={SCHEMA}"] if schema else []
    named = shlex.quote(str(path))  # from where it was written, as are the paths in it
    does = "trains, evaluates" if command == "train-eval" else "trains"
    lines += [
        f"# swlora check {named}: what it comes to, and what is wrong with it",
        f"# swlora {command} --config {named}: {does}; a flag wins over the file",
        f"# What is not here has its default: `swlora {command} --help` names all of it.",
    ]
    section = None
    for setting in settings:
        if setting.section != section:
            section = setting.section
            lines += ["", f"{section}:"]
        shown = _flow(setting.value)
        mark = "# " if setting.is_hint else ""
        line = f"  {mark}{setting.name}: {shown}"
        lines.append(f"{line.ljust(34)}  # {' '.join(setting.why.split())}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """Write a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
