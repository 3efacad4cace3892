"""The five scores of the E2E NLG challenge: BLEU, NIST, METEOR, ROUGE-L and CIDEr.

Definitions are those of the challenge's own script (e2e-metrics, measure_scores.py -p): BLEU and
NIST on mteval tokens, the other three on lower-cased Penn-Treebank tokens. Every score comes from
rows per segment, so that a bootstrap resamples segments without tokenising again:
    corpus score = f(sum of rows) for BLEU, NIST and METEOR, mean of rows for ROUGE-L and CIDEr.
Weights that depend on the whole test set (NIST information, CIDEr document frequency) stay those
of the whole set. METEOR needs Java; without it the score is None, never another number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from swlora.errors import UserError
from swlora.evaluation.meteor import (
    java_ptb_tokenize,
    meteor_score,
    meteor_statistics,
    missing_java,
)
from swlora.evaluation.ngram_scores import (
    bleu,
    bleu_statistics,
    mteval_tokens,
    nist,
    nist_statistics,
)
from swlora.evaluation.ptb import ptb_tokenize
from swlora.plural import counted
from swlora.result_json import key

Rows = NDArray[np.float64]
_NO_WORD = "\0"


@dataclass(frozen=True)
class Scores:
    """Corpus scores on the official scales: NIST and CIDEr unbounded, the others in [0, 1]."""

    bleu: float = field(metadata=key("BLEU"))
    nist: float = field(metadata=key("NIST"))
    meteor: float | None = field(metadata=key("METEOR"))
    rouge_l: float = field(metadata=key("ROUGE_L"))
    cider: float = field(metadata=key("CIDEr"))
    meteor_reason: str | None
    """Why METEOR is None; None where it was computed."""
    tokenizer: Literal["java", "python"]

    def by_name(self) -> dict[str, float | None]:
        """Return the scores under their official names."""
        return {
            "BLEU": self.bleu,
            "NIST": self.nist,
            "METEOR": self.meteor,
            "ROUGE_L": self.rouge_l,
            "CIDEr": self.cider,
        }


@dataclass(frozen=True)
class SegmentStatistics:
    """Rows per segment that the corpus scores are made of."""

    bleu: Rows
    nist: Rows
    meteor: Rows | None
    rouge_l: Rows
    cider: Rows
    meteor_reason: str | None
    tokenizer: Literal["java", "python"]

    def corpus(self, indices: NDArray[np.integer[Any]] | None = None) -> dict[str, float]:
        """Scores of the segments at indices (may repeat), or of all; no METEOR without Java."""
        chosen = np.arange(len(self.cider)) if indices is None else indices
        if len(chosen) == 0:
            raise UserError("no segments to score: pass at least one index")
        scores = {
            "BLEU": bleu(self.bleu[chosen].sum(axis=0)),
            "NIST": nist(self.nist[chosen].sum(axis=0)),
            "ROUGE_L": float(self.rouge_l[chosen].mean()),
            "CIDEr": float(self.cider[chosen].mean()),
        }
        if self.meteor is not None:
            scores["METEOR"] = meteor_score(self.meteor[chosen].sum(axis=0))
        return scores

    def scores(self) -> Scores:
        """The scores of all segments, with how they were computed."""
        scores = self.corpus()
        return Scores(
            bleu=scores["BLEU"],
            nist=scores["NIST"],
            rouge_l=scores["ROUGE_L"],
            cider=scores["CIDEr"],
            meteor=scores.get("METEOR"),
            meteor_reason=self.meteor_reason,
            tokenizer=self.tokenizer,
        )

    def resampled(self, weights: Rows) -> dict[str, Rows]:
        """Scores (R,) of R resamples; weights (R, n) says how often each holds each segment."""
        n_drawn = weights.sum(axis=1)
        if weights.ndim != 2 or not n_drawn.all():
            raise UserError("no segments to score: every resample needs at least one")
        scores = {
            "BLEU": np.array([bleu(total) for total in weights @ self.bleu]),
            "NIST": np.array([nist(total) for total in weights @ self.nist]),
            "ROUGE_L": weights @ self.rouge_l / n_drawn,
            "CIDEr": weights @ self.cider / n_drawn,
        }
        if self.meteor is not None:
            scores["METEOR"] = np.array([meteor_score(total) for total in weights @ self.meteor])
        return scores


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions:
        raise UserError("nothing to score: there are no predictions")
    if len(predictions) != len(references):
        raise UserError(
            f"{counted(len(predictions), 'prediction')} for "
            f"{counted(len(references), 'reference group')}: give one prediction per group"
        )
    for position, group in enumerate(references):
        if isinstance(group, str) or not group:
            raise UserError(f"reference group {position} has to be a list of at least one text")


def _java_reason(java: bool | None) -> str | None:
    """None where the Java programs are to be used, else why not."""
    if java is False:
        return "Java was switched off"
    reason = missing_java()
    if java and reason:
        raise UserError(f"Java was asked for: {reason}")
    return reason


def _caption_rows(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[Rows, Rows]:
    """ROUGE-L and CIDEr per segment, by the scorers of pycocoevalcap."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates = {i: [" ".join(tokens)] for i, tokens in enumerate(hypotheses)}
    truths = {i: [" ".join(tokens) for tokens in group] for i, group in enumerate(references)}
    _, rouge_l = Rouge().compute_score(truths, candidates)
    _, cider = Cider().compute_score(truths, candidates)
    return np.asarray(rouge_l, np.float64), np.asarray(cider, np.float64)


def segment_statistics(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    java: bool | None = None,
    strict: bool = True,
) -> SegmentStatistics:
    """Tokenise and compare once; the result scores any resample of the segments.

    java: None uses Java where it is found, True insists on it, False does without. An empty
    prediction counts as a segment without hits. CIDEr of a single segment is 0 by definition.
    UserError for unequal lengths, no predictions, an empty group, and where it is `strict` a
    reference without words, which else holds a word that no text has.
    """
    _check(predictions, references)
    reason = _java_reason(java)
    tokenize = ptb_tokenize if reason else java_ptb_tokenize
    flat = iter(tokenize([text for group in references for text in group]))
    truths = [[next(flat) for _ in group] for group in references]
    for position, group in enumerate(truths):
        if strict and not all(group):
            raise UserError(f"reference group {position} has a reference without any word")
    truths = [[tokens or [_NO_WORD] for tokens in group] for group in truths]
    hypotheses = tokenize(predictions)
    rouge_l, cider = _caption_rows(hypotheses, truths)
    texts = [mteval_tokens(text) for text in predictions]
    groups = [[mteval_tokens(text) for text in group] for group in references]
    return SegmentStatistics(
        bleu=bleu_statistics(texts, groups),
        nist=nist_statistics(texts, groups),
        meteor=None if reason else meteor_statistics(hypotheses, truths),
        rouge_l=rouge_l,
        cider=cider,
        meteor_reason=reason,
        tokenizer="python" if reason else "java",
    )
