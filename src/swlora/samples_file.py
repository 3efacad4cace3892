"""samples.jsonl of a run folder: what was generated while the training was under way."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from swlora.bounded_read import UnreadableError, parse_json, read_tail
from swlora.files import write_text

SAMPLES = "samples.jsonl"
MAX_BYTES = 2 << 20  # of the end, that are shown: a page reads them every few seconds


@dataclass(frozen=True)
class Sample:
    """What followed a prompt after a step."""

    step: int
    prompt: str
    text: str


def add_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Add the samples of one step, in place of those of this and later ones, which are done again.

    Raises OSError where the disk is full.
    """
    path = folder / SAMPLES
    n_bytes = path.stat().st_size if path.exists() else 0  # all, however many
    kept = [one for one in _read_end(path, n_bytes) if one.step < samples[0].step]
    write_text(path, "".join(_lines([*kept, *samples])))


def read_samples(folder: Path) -> list[Sample]:
    """Return the samples so far, the newest of very many, without lines of another kind."""
    return _read_end(folder / SAMPLES, MAX_BYTES)


def _read_end(path: Path, n_bytes: int) -> list[Sample]:
    """Return the samples in the last bytes of a file, without lines that are torn."""
    try:
        content = read_tail(path, n_bytes)
    except UnreadableError:
        return []
    return [sample for line in content.splitlines() if (sample := _read(line))]


def _lines(samples: Iterable[Sample]) -> Iterable[str]:
    return (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)


def _read(line: bytes) -> Sample | None:
    try:
        row = parse_json(line)
    except UnreadableError:
        return None
    match row:
        case {"step": int(step), "prompt": str(prompt), "text": str(text)}:
            return Sample(step, prompt, text)
    return None
