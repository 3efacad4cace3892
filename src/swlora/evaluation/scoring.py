"""A model's texts, scored in every way that is reported, and the files that they are left in."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from swlora.evaluation.scores import SegmentStatistics, segment_statistics
from swlora.evaluation.segments import Segments
from swlora.evaluation.text_scores import TextRows, TextScores, text_rows, text_scores
from swlora.files import atomic_path
from swlora.loss_sum import LossSum

CSV_FILE, JSONL_FILE = "predictions.csv", "predictions.jsonl"


@dataclass(frozen=True)
class TextsScored:
    """The texts that were generated for some prompts, and what was measured of each.

    `losses` are those of all references of a prompt; `are_all` says that the split has no documents
    beside these prompts.
    """

    prompts: Sequence[str]
    predictions: Sequence[str]
    references: Sequence[Sequence[str]]
    losses: Sequence[LossSum]
    statistics: SegmentStatistics
    rows: TextRows
    are_all: bool = True

    @cached_property
    def segments(self) -> Segments:
        """What a bootstrap resamples."""
        return Segments.of(self.statistics, list(self.losses), are_all=self.are_all)

    def text_scores(self) -> TextScores:
        """Return the scores of any text."""
        return text_scores(self.rows, self.predictions, self.references)

    def write(self, folder: Path) -> Path:
        """Leave predictions.csv, predictions.jsonl and segments.json; return the first.

        In the CSV, white space of a prediction is single spaces, as E2E's scores see it.
        """
        write_predictions(
            folder / CSV_FILE,
            self.prompts,
            one_line(self.predictions),
            self.references,
            [self._measured(i) for i in range(len(self.prompts))],
        )
        with (
            atomic_path(folder / JSONL_FILE) as scratch,
            scratch.open("w", encoding="utf-8", newline="") as file,
        ):
            file.writelines(f"{line}\n" for line in self._json_lines())
        self.segments.write(folder)
        return folder / CSV_FILE

    def _json_lines(self) -> Iterator[str]:
        for i, (prompt, text) in enumerate(zip(self.prompts, self.predictions, strict=True)):
            record = {
                "prompt": prompt,
                "prediction": text,
                "references": list(self.references[i]),
                **self._measured(i),
            }
            yield json.dumps(record, ensure_ascii=False, allow_nan=False)

    def _measured(self, i: int) -> dict[str, float]:
        """Return the scores of a prompt's text and the loss of its references."""
        return {
            "exact_match": float(self.rows.exact_match[i]),
            "token_f1": float(self.rows.token_f1[i]),
            "chrf": float(self.rows.chrf[i]),
            "rouge_l": float(self.statistics.rouge_l[i]),
            "sum_nats": self.losses[i].sum_nats,
            "n_tokens": self.losses[i].n_tokens,
        }


def score_texts(
    prompts: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    losses: Sequence[LossSum],
    *,
    are_all: bool = True,
) -> TextsScored:
    """Score the text of each prompt; a reference without any word is matched by no word.

    `are_all` as in `TextsScored`.
    """
    statistics = segment_statistics(one_line(predictions), references, strict=False)
    rows = text_rows(predictions, references)
    return TextsScored(prompts, predictions, references, losses, statistics, rows, are_all)


def one_line(texts: Sequence[str]) -> list[str]:
    """Return texts whose white space is single spaces."""
    return [" ".join(text.split()) for text in texts]


def write_predictions(
    target: Path,
    prompts: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    measured: Sequence[dict[str, float]],
) -> None:
    """Write prompt, prediction, all references (a column each, as many as there are), scores."""
    width = max(len(refs) for refs in references)
    with (
        atomic_path(target) as scratch,
        scratch.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        columns = [f"ref_{k + 1}" for k in range(width)]
        writer.writerow(["prompt", "prediction", *columns, *(measured[0] if measured else ())])
        for prompt, prediction, refs, values in zip(
            prompts, predictions, references, measured, strict=True
        ):
            padded = [*refs, *[""] * (width - len(refs))]
            writer.writerow([prompt, prediction, *padded, *values.values()])
