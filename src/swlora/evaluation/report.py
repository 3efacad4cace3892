"""What an evaluation leaves behind: predictions as CSV, scores as a table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swlora.evaluation.bootstrap import CONFIDENCE, FEW_PROMPTS, N_DRAWS
from swlora.evaluation.scales import OF_100, SCALES
from swlora.files import atomic_path


def write_predictions(
    target: Path,
    prompts: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> None:
    """Write prompt, prediction and all references (one column each, as many as there are)."""
    width = max(len(refs) for refs in references)
    with (
        atomic_path(target) as scratch,
        scratch.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["prompt", "prediction", *(f"ref_{k + 1}" for k in range(width))])
        for prompt, prediction, refs in zip(prompts, predictions, references, strict=True):
            writer.writerow([prompt, prediction, *refs, *[""] * (width - len(refs))])


def scores_table(scores: dict[str, Any]) -> str:
    """Return an evaluation's scores as aligned text, with intervals where it has some.

    A score that could not be computed is n/a; few prompts are warned of.
    """
    intervals = scores.get("intervals") or {}
    lines = [f"{'score':<8} {'value':>8}  {CONFIDENCE:.0%} interval"] if intervals else []
    values = {"NLL": scores.get("nll"), **scores}
    notes = {"NLL": "nats a completion token", "METEOR": scores.get("meteor_reason")}
    for key, scale in SCALES.items():
        value = values.get(key)
        if value is None and key == "NLL":
            continue  # outputs of no model
        shown = "n/a" if value is None else scale.number(value)
        bounds = scale.interval(intervals[key]) if key in intervals else ""
        note = notes.get(key) if value is None or key == "NLL" else None
        said = f"{bounds:<16} {f'({note})' if note else ''}".strip()
        lines.append(f"{scale.name:<8} {shown:>8}  {said}".rstrip())
    if scores.get("english_perplexity") is not None:
        now, before = (f"{scores[f'english_perplexity{k}']:.1f}" for k in ("", "_before"))
        lines.append(f"{'PPL':<8} {now:>8}  of English text; {before} before training")
    return "\n".join([*lines, *_remarks(scores, has_intervals=bool(intervals))])


def _remarks(scores: dict[str, Any], *, has_intervals: bool) -> list[str]:
    """Say what the numbers mean, and where they mean little."""
    n = scores.get("n_prompts")
    drawn = f"; intervals from {N_DRAWS:,} draws of the {n} prompts" if has_intervals else ""
    said = [OF_100 + drawn]
    if n is not None and n < FEW_PROMPTS:
        too_narrow = ", and intervals from so few are too narrow" if has_intervals else ""
        said.append(
            f"only {n} prompt{'s' * (n > 1)}: the scores say little of other prompts{too_narrow}; "
            f"evaluate on {FEW_PROMPTS} or more"
        )
    return said
