"""What an evaluation leaves behind: predictions as CSV, scores as a table."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from swlora.evaluation.bootstrap import CONFIDENCE, FEW_PROMPTS, N_DRAWS
from swlora.evaluation.evaluated import EnglishLoss
from swlora.evaluation.scales import OF_100, SCALES
from swlora.evaluation.scores import Scores
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


def scores_table(
    scores: Scores,
    intervals: Mapping[str, Sequence[float]],
    n_prompts: int,
    *,
    nll: float | None = None,
    english: EnglishLoss | None = None,
) -> str:
    """Return scores as aligned text, with the intervals that there are.

    A score that could not be computed is n/a; few prompts are warned of. `nll` in nats a token is
    None for outputs of no model.
    """
    lines = [f"{'score':<8} {'value':>8}  {CONFIDENCE:.0%} interval"] if intervals else []
    values = {"NLL": nll, **scores.by_name()}
    notes = {"NLL": "nats a completion token", "METEOR": scores.meteor_reason}
    for key, scale in SCALES.items():
        value = values.get(key)
        if value is None and key == "NLL":
            continue
        shown = "n/a" if value is None else scale.number(value)
        bounds = scale.interval(intervals[key]) if key in intervals else ""
        note = notes.get(key) if value is None or key == "NLL" else None
        said = f"{bounds:<16} {f'({note})' if note else ''}".strip()
        lines.append(f"{scale.name:<8} {shown:>8}  {said}".rstrip())
    if english is not None:
        now, before = f"{english.perplexity:.1f}", f"{english.perplexity_before:.1f}"
        lines.append(f"{'PPL':<8} {now:>8}  of English text; {before} before training")
    return "\n".join([*lines, *_remarks(n_prompts, has_intervals=bool(intervals))])


def _remarks(n: int, *, has_intervals: bool) -> list[str]:
    """Say what the numbers of `n` prompts mean, and where they mean little."""
    drawn = f"; intervals from {N_DRAWS:,} draws of the {n} prompts" if has_intervals else ""
    said = [OF_100 + drawn]
    if n < FEW_PROMPTS:
        too_narrow = ", and intervals from so few are too narrow" if has_intervals else ""
        said.append(
            f"only {n} prompt{'s' * (n > 1)}: the scores say little of other prompts{too_narrow}; "
            f"evaluate on {FEW_PROMPTS} or more"
        )
    return said
