"""What an evaluation leaves behind: predictions as CSV, scores as a table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swlora.files import atomic_path

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")


def write_predictions(
    target: Path,
    prompts: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> None:
    """Write mr, prediction and all references (one column each, as many as there are)."""
    width = max(len(refs) for refs in references)
    with (
        atomic_path(target) as scratch,
        scratch.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["mr", "prediction", *(f"ref_{k + 1}" for k in range(width))])
        for prompt, prediction, refs in zip(prompts, predictions, references, strict=True):
            writer.writerow([prompt, prediction, *refs, *[""] * (width - len(refs))])


def scores_table(scores: dict[str, Any]) -> str:
    """Return the scores as aligned text; a score that could not be computed is n/a."""
    lines = []
    for name in METRICS:
        value = scores.get(name)
        shown = "n/a" if value is None else f"{value:.4f}"
        reason = scores.get("meteor_reason") if name == "METEOR" and value is None else None
        lines.append(f"{name:<8} {shown:>8}" + (f"  ({reason})" if reason else ""))
    if "nll" in scores:
        lines.append(f"{'NLL':<8} {scores['nll']:>8.4f}  nats a completion token")
    if "english_perplexity" in scores:
        value, before = (f"{scores[f'english_perplexity{k}']:.2f}" for k in ("", "_before"))
        lines.append(f"{'PPL':<8} {value:>8}  of English text; {before} before training")
    return "\n".join(lines)
