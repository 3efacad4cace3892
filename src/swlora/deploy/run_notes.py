"""What run folders say of how an adapter came about: command, timings, super weights, scores."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from swlora.command_settings import SETTINGS
from swlora.config import RunSpec, load_recorded_spec
from swlora.errors import UserError
from swlora.paths import may_be_path
from swlora.plural import counted
from swlora.result_json import from_json
from swlora.runs import read_result, read_run
from swlora.settings import SECRET, flag_name

T = TypeVar("T")


def training_sections(run: Path) -> Iterator[str]:
    """Yield sections of a card on the training in a run folder; no path is in them."""
    facts, result = read_run(run), read_result(run)
    yield "## How it was trained"
    yield f"```\n{command_of(load_recorded_spec(run / 'config.yaml', {}), facts['command'])}\n```"
    yield _timings(facts, result)
    if found := result.get("identify"):
        yield from _super_weights(run, found)


def score_sections(run: Path) -> Iterator[str]:
    """Yield sections of a card on the evaluation in a run folder; none where it has none."""
    from swlora.evaluation.evaluated import Evaluated
    from swlora.evaluation.report import evaluation_table

    scored = read_result(run).get("eval")
    if scored is None:
        return
    evaluated = _read_back(Evaluated, scored, run, "scores")
    data = _plain(str(load_recorded_spec(run / "config.yaml", {}).data.name))
    yield "## Scores"
    yield (
        f"On the {evaluated.split} split of {data}: {counted(evaluated.n_prompts, 'prompt')}, "
        f"{counted(evaluated.n_rows, 'row')}."
    )
    yield f"```\n{evaluation_table(evaluated)}\n```"


def _read_back(kind: type[T], values: Any, run: Path, what: str) -> T:
    """Return a part of what came out of a run; UserError, naming `what` it is, where it is none."""
    try:
        return from_json(kind, values, partial=True)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run / 'result.json'} holds no readable {what}: {error}") from error


def command_of(spec: RunSpec, command: str) -> str:
    """Return a command line that has these settings: those that are not the defaults.

    Files and folders stand in it by their names alone, since paths mean nothing elsewhere.
    """
    words = ["swlora", command]
    given, defaults = spec.model_dump(mode="json"), RunSpec().model_dump(mode="json")
    for path in SETTINGS[command]:
        value, default = (_value(tree, path) for tree in (given, defaults))
        if value != default and value is not None and path not in SECRET:
            words += _as_flag(flag_name(path), value)
    return shlex.join(words)


def _value(tree: dict[str, Any], path: str) -> Any:
    section, _, name = path.partition(".")
    return tree[section][name] if name else tree.get(section)


def _as_flag(flag: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield flag if value else f"--no-{flag[2:]}"
        return
    for one in value if isinstance(value, list) else [value]:
        yield from (flag, _plain(f"{one:g}" if isinstance(one, float) else str(one)))


def _plain(value: str) -> str:
    """Return the name of a file or folder in place of its path; other values as they are."""
    is_path = value.startswith(("/", "./", "../", "~")) or (
        value.count("/") != 1 and "/" in value and ":" not in value
    )
    is_path = is_path or (may_be_path(value) and Path(value).exists())
    return Path(value).name if is_path else value


def _timings(facts: dict[str, Any], result: dict[str, Any]) -> str:
    shares = {name: s for name, s in facts.get("timings_s", {}).items() if s >= 0.5}
    shown = ", ".join(f"{name.replace('_', ' ')} {s:,.0f} s" for name, s in shares.items())
    rate = (result.get("train") or {}).get("examples_per_s")
    speed = f"; {rate:.1f} examples/s in training" if rate else ""
    return f"It took: {shown or 'less than a second'}{speed} ({facts.get('machine', 'unknown')})."


def _super_weights(run: Path, found: dict[str, Any]) -> Iterator[str]:
    from swlora.superweights.findings import Identified
    from swlora.superweights.report import COLUMNS, answer, rows

    identified = _read_back(Identified, found, run, "super weights")
    yield "## Super weights"
    lines = [COLUMNS, ["-"] * len(COLUMNS), *rows(identified)]
    yield "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    yield "\n".join(answer(identified))
