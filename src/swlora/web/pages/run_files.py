"""What lies in a run folder beside its result, read as from a stranger: little of it, never a link.

Whatever cannot be read, or is of another kind than it should be, is nothing.
"""

import csv
import io
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swlora.adapters.saved import WEIGHTS
from swlora.bounded_read import UnreadableError, read_bounded
from swlora.config.yaml_file import parse_yaml
from swlora.samples_file import read_samples

MAX_CONFIG_BYTES = 64 * 1024
MAX_PREDICTIONS_BYTES = 512 * 1024  # of the beginning of the file
MAX_PREDICTIONS = 10
MAX_SAMPLES = 5  # shown of a prompt
MAX_CHARACTERS = 2000  # of one cell
PROMPT_COLUMNS = ("prompt", "mr")


@dataclass(frozen=True)
class Prediction:
    """A prompt of the evaluation, what was generated for it, and what people wrote."""

    prompt: str
    text: str
    references: list[str]


@dataclass(frozen=True)
class Sampled:
    """A prompt, and (step, what followed it then)."""

    prompt: str
    texts: list[tuple[int, str]]


def read_start(path: Path, n_bytes: int) -> tuple[str, bool] | None:
    """Return (the text of the first `n_bytes`, whether that is all); None for what is no file."""
    try:
        content, is_whole = read_bounded(path, n_bytes, follow_links=False)
    except UnreadableError:
        return None
    return content.decode("utf-8", "replace"), is_whole


def read_config(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of config.yaml."""
    found = read_start(folder / "config.yaml", MAX_CONFIG_BYTES)
    if found is None or not found[1]:
        return {}
    try:
        tree = parse_yaml(found[0])
    except (yaml.YAMLError, ValueError):
        return {}
    sections = tree.items() if isinstance(tree, dict) else ()
    return {str(name): part for name, part in sections if isinstance(part, dict)}


def read_predictions(folder: Path) -> list[Prediction]:
    """Return the first rows of predictions.csv."""
    found = read_start(folder / "predictions.csv", MAX_PREDICTIONS_BYTES)
    if found is None:
        return []
    text, is_whole = found
    rows = []
    try:
        for row in csv.DictReader(io.StringIO(text, newline="")):
            rows.append(row)
            if len(rows) > MAX_PREDICTIONS:
                break
    except csv.Error:
        return []
    if not is_whole and len(rows) <= MAX_PREDICTIONS:
        rows = rows[:-1]  # the last one is cut off
    shown = [_prediction(row) for row in rows[:MAX_PREDICTIONS]]
    return [one for one in shown if one is not None]


def sampled_prompts(folder: Path) -> list[Sampled]:
    """Return the prompts of samples.jsonl with what followed them, the newest first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for sample in reversed(read_samples(folder)):
        said = found.setdefault(sample.prompt, [])
        if len(said) < MAX_SAMPLES:
            said.append((sample.step, sample.text[:MAX_CHARACTERS]))
    prompts = list(found.items())[::-1][:MAX_PREDICTIONS]
    return [Sampled(prompt[:MAX_CHARACTERS], texts) for prompt, texts in prompts]


def adapter_bytes(folder: Path) -> int | None:
    """Return the size of the weights of the adapter in a folder; None where there is none."""
    try:
        found = (folder / WEIGHTS).lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _prediction(row: dict[Any, Any]) -> Prediction | None:
    cells = {k: v[:MAX_CHARACTERS] for k, v in row.items() if k and isinstance(v, str)}
    prompt = next((cells[name] for name in PROMPT_COLUMNS if name in cells), None)
    if prompt is None or "prediction" not in cells:
        return None
    references = [text for name, text in cells.items() if name.startswith("ref_") and text]
    return Prediction(prompt, cells["prediction"], references)
