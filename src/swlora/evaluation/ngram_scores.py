"""BLEU and NIST as sums of per-segment statistics, so that a bootstrap only re-adds rows.

Text is tokenised as by mteval-v13a and lower-cased. With several references of any number per
segment, a hypothesis n-gram is a hit as often as in the reference that has it most often.
BLEU (Papineni et al. 2002), N = 4, no smoothing, r = reference length closest to the
hypothesis, the shorter on a tie:
    exp(min(0, 1 - r/c)) * exp(1/N sum_n log(hits_n / total_n))
NIST (Doddington 2002), N = 5, r = mean reference length; counts over all references:
    info(w_1..w_n) = log2(count(w_1..w_{n-1}) / count(w_1..w_n))
    sum_n (sum of info over hits / total_n) * exp(beta log(min(1, c/r))^2), factor 1/2 at c/r = 2/3
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLEU_ORDER = 4
NIST_ORDER = 5
_NIST_BETA = math.log(0.5) / math.log(1.5) ** 2

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SYMBOL = re.compile(r"""([!"#$%&()*+/:;<=>?@\[\\\]^_`{|}~])""")
_POINT_AFTER_NON_DIGIT = re.compile(r"([^0-9])([.,])")
_POINT_BEFORE_NON_DIGIT = re.compile(r"([.,])([^0-9])")
_DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")

Grams = Counter[tuple[str, ...]]


def mteval_tokens(text: str) -> list[str]:
    """Lower-cased tokens of one text: symbols apart, '.' ',' '-' kept inside numbers and words."""
    text = " ".join(text.replace("<skipped>", "").split())
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = _SYMBOL.sub(r" \1 ", f" {text.lower()} ")
    text = _POINT_AFTER_NON_DIGIT.sub(r"\1 \2 ", text)
    text = _POINT_BEFORE_NON_DIGIT.sub(r" \1 \2", text)
    return _DASH_AFTER_DIGIT.sub(r"\1 \2 ", text).split()


def _ngrams(tokens: Sequence[str], order: int) -> Grams:
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def _hits(hypothesis: Sequence[str], references: Sequence[Sequence[str]], order: int) -> Grams:
    """N-grams of the hypothesis found in the references, each at most its largest count there."""
    largest: Grams = Counter()
    for reference in references:
        largest |= _ngrams(reference, order)
    return _ngrams(hypothesis, order) & largest


def bleu_statistics(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> NDArray[np.float64]:
    """Rows [hits_1..4, total_1..4, hypothesis length, closest reference length] per segment."""
    rows = []
    for hypothesis, group in zip(hypotheses, references, strict=True):
        length = len(hypothesis)
        orders = range(1, BLEU_ORDER + 1)
        hits = [_hits(hypothesis, group, order).total() for order in orders]
        totals = [max(0, length - order + 1) for order in orders]
        _, closest = min((abs(len(reference) - length), len(reference)) for reference in group)
        rows.append([*hits, *totals, length, closest])
    return np.array(rows, dtype=np.float64)


def bleu(total: NDArray[np.float64]) -> float:
    """Corpus BLEU in [0, 1] of summed rows; 0 where some order has no hit."""
    hits, totals = total[:BLEU_ORDER], total[BLEU_ORDER : 2 * BLEU_ORDER]
    if hits.min() == 0:
        return 0.0
    length, closest = total[-2:]
    return float(np.exp(min(0.0, 1 - closest / length) + np.log(hits / totals).mean()))


def nist_statistics(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> NDArray[np.float64]:
    """Rows [info of hits_1..5, total_1..5, hypothesis length, mean reference length] per segment.

    The information weights are those of all given references, also when rows are resampled.
    """
    counts: Grams = Counter()
    for reference in (reference for group in references for reference in group):
        counts[()] += len(reference)
        for order in range(1, NIST_ORDER + 1):
            counts.update(_ngrams(reference, order))
    rows = []
    for hypothesis, group in zip(hypotheses, references, strict=True):
        orders = range(1, NIST_ORDER + 1)
        information = [
            sum(
                times * math.log2(counts[gram[:-1]] / counts[gram])
                for gram, times in _hits(hypothesis, group, order).items()
            )
            for order in orders
        ]
        totals = [max(0, len(hypothesis) - order + 1) for order in orders]
        mean_length = sum(map(len, group)) / len(group)
        rows.append([*information, *totals, len(hypothesis), mean_length])
    return np.array(rows, dtype=np.float64)


def nist(total: NDArray[np.float64]) -> float:
    """Corpus NIST (unbounded, larger is better) of summed rows; an order without n-grams adds 0."""
    information, totals = total[:NIST_ORDER], total[NIST_ORDER : 2 * NIST_ORDER]
    length, mean_length = total[-2:]
    if length == 0:
        return 0.0
    penalty = math.exp(_NIST_BETA * math.log(min(1.0, length / mean_length)) ** 2)
    return float((information / np.maximum(totals, 1)).sum()) * penalty
