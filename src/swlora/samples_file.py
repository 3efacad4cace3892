"""samples.jsonl of a run folder: what was generated while the training was under way."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from swlora.bounded_read import UnreadableError, parse_json, read_bounded
from swlora.files import write_text

SAMPLES = "samples.jsonl"
MAX_BYTES = 16 << 20  # that are read


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
    kept = [sample for sample in read_samples(folder) if sample.step < samples[0].step]
    write_text(folder / SAMPLES, "".join(_lines([*kept, *samples])))


def read_samples(folder: Path) -> list[Sample]:
    """Return the samples so far, without lines that are torn or of another kind."""
    try:
        content, _ = read_bounded(folder / SAMPLES, MAX_BYTES, follow_links=False)
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
