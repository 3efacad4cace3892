"""Scores of any text against one or several references: what people report beside E2E's five.

    exact match   the text is a reference, white space aside
    token F1      of the words in common with the nearest reference, lower-cased, without
                  punctuation and articles (SQuAD: Rajpurkar et al. 2016)
    chrF, BLEU    of sacrebleu (Popovic 2015; Papineni et al. 2002, Post 2018), 0 to 100, with the
                  signature that says how

Exact match and F1 are means over prompts of the best reference, chrF and BLEU of the whole corpus.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swlora.evaluation.bootstrap import score_intervals
from swlora.evaluation.scores import Rows

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class TextScores:
    """Exact match and token F1 from 0 to 1, chrF and BLEU from 0 to 100.

    `text_intervals` are [low, high] of the first two; {} for a single prompt. The signatures are
    sacrebleu's.
    """

    exact_match: float
    token_f1: float
    chrf: float
    sacrebleu: float
    chrf_signature: str
    sacrebleu_signature: str
    text_intervals: dict[str, list[float]]


@dataclass(frozen=True)
class TextRows:
    """Scores of each text by itself, (n,) each: its exact match, token F1 and chrF."""

    exact_match: Rows
    token_f1: Rows
    chrf: Rows


def text_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> TextRows:
    """Score each text against its references."""
    from sacrebleu.metrics import CHRF

    chrf, pairs = CHRF(), list(zip(predictions, references, strict=True))
    return TextRows(
        np.array([max(exact_match(text, ref) for ref in refs) for text, refs in pairs]),
        np.array([max(token_f1(text, ref) for ref in refs) for text, refs in pairs]),
        np.array([chrf.sentence_score(text, list(refs)).score for text, refs in pairs]),
    )


def text_scores(
    rows: TextRows, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> TextScores:
    """Score all texts together; `rows` are what `text_rows` gave for them."""
    from sacrebleu.metrics import BLEU, CHRF

    width = max(map(len, references))
    # sacrebleu wants a list of the k-th references; None where a text has fewer.
    streams = [[refs[k] if k < len(refs) else None for refs in references] for k in range(width)]
    bleu, chrf = BLEU(), CHRF()
    hypotheses = list(predictions)

    def resampled(weights: Rows) -> dict[str, Rows]:
        n_drawn = weights.sum(axis=1)
        return {
            "exact_match": weights @ rows.exact_match / n_drawn,
            "token_f1": weights @ rows.token_f1 / n_drawn,
        }

    return TextScores(
        exact_match=float(rows.exact_match.mean()),
        token_f1=float(rows.token_f1.mean()),
        chrf=float(chrf.corpus_score(hypotheses, streams).score),
        sacrebleu=float(bleu.corpus_score(hypotheses, streams).score),
        chrf_signature=str(chrf.get_signature()),
        sacrebleu_signature=str(bleu.get_signature()),
        text_intervals=score_intervals(resampled, len(predictions)),
    )


def exact_match(text: str, reference: str) -> float:
    """Return 1 where a text is its reference, white space aside, else 0."""
    return float(text.split() == reference.split())


def token_f1(text: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of the words; 1 where neither has any."""
    words, wanted = _words(text), _words(reference)
    n_common = sum((Counter(words) & Counter(wanted)).values())
    if not words or not wanted:
        return float(words == wanted)
    return 2 * n_common / (len(words) + len(wanted))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
