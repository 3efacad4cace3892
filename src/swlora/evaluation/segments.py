"""What an evaluation measured of every distinct prompt: the rows that a bootstrap resamples.

Kept as segments.json in the run folder, so that intervals and paired differences of any two runs
on the same prompts need neither a model nor Java. Segments are in the order of predictions.csv.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from swlora.errors import UserError
from swlora.evaluation.bootstrap import score_intervals
from swlora.evaluation.scores import Rows, SegmentStatistics
from swlora.files import write_text
from swlora.loss_sum import LossSum, as_count

FILE = "segments.json"
_ROWS = ("bleu", "nist", "meteor", "rouge_l", "cider")


@dataclass(frozen=True)
class Segments:
    """Statistics of the scores, and the loss of the references: sum_nats, n_tokens (n,).

    `are_all` says that no documents stand beside the prompts: the NLL of the split is theirs too,
    and draws of prompts do not tell how sure it is.
    """

    statistics: SegmentStatistics
    sum_nats: Rows
    n_tokens: Rows
    are_all: bool = True

    @classmethod
    def of(
        cls, statistics: SegmentStatistics, losses: list[LossSum], *, are_all: bool = True
    ) -> Self:
        """Put the two measurements of the same segments together."""
        if len(losses) != len(statistics.cider):
            raise ValueError(f"{len(losses)} losses for {len(statistics.cider)} segments")
        sums, tokens = zip(*((loss.sum_nats, loss.n_tokens) for loss in losses), strict=True)
        return cls(statistics, np.array(sums, np.float64), np.array(tokens, np.float64), are_all)

    def __len__(self) -> int:
        return len(self.sum_nats)

    def resampled(self, weights: Rows) -> dict[str, Rows]:
        """Corpus scores and "NLL" (nats a token), (R,) each, of resamples weights (R, n).

        Without "NLL" where documents stand beside the prompts.
        """
        scores = self.statistics.resampled(weights)
        if self.are_all:
            scores["NLL"] = (weights @ self.sum_nats) / (weights @ self.n_tokens)
        return scores

    def intervals(self) -> dict[str, list[float]]:
        """Return [low, high] of every score and of "NLL"; {} for a single prompt."""
        return score_intervals(self.resampled, len(self))

    def write(self, folder: Path) -> None:
        """Write segments.json into a run folder; floats are read back exactly."""
        s = self.statistics
        rows: dict[str, Any] = {name: getattr(s, name) for name in _ROWS}
        values = {
            "meteor_reason": s.meteor_reason,
            "tokenizer": s.tokenizer,
            "sum_nats": self.sum_nats.tolist(),
            "n_tokens": [as_count(n) for n in self.n_tokens.tolist()],
            "are_all": self.are_all,
            **{name: None if value is None else value.tolist() for name, value in rows.items()},
        }
        write_text(folder / FILE, json.dumps(values, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read segments.json of a run folder; UserError where it is absent or damaged."""
        path = folder / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            rows: dict[str, Any] = {name: values[name] for name in _ROWS}
            rows = {
                n: None if value is None else np.array(value, float) for n, value in rows.items()
            }
            statistics = SegmentStatistics(
                **rows, meteor_reason=values["meteor_reason"], tokenizer=values["tokenizer"]
            )
            sums, tokens = (np.array(values[name], float) for name in ("sum_nats", "n_tokens"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} holds no readable segments; evaluate that run again"
            ) from error
        lengths = {len(values) for values in (sums, tokens, *rows.values()) if values is not None}
        if len(lengths) != 1:
            raise UserError(f"{path} is damaged: its lists have lengths {sorted(lengths)}")
        return cls(statistics, sums, tokens, values.get("are_all", True))  # older files do not say
