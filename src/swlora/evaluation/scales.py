"""How scores look to a person, everywhere: on the scales of papers, to digits that mean something.

Tables of papers have BLEU, METEOR and ROUGE-L of 100; the official script prints them from 0 to 1,
and result.json keeps them so. NIST and CIDEr have no upper end, the loss is in nats a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

RAW_SCALE = "as the official script prints them: BLEU, METEOR and ROUGE_L from 0 to 1"
OF_100 = "BLEU, METEOR and ROUGE-L are of 100"
OF_100_ANY_TEXT = "exact, F1, chrF, sacreBLEU and ROUGE-L are of 100"


@dataclass(frozen=True)
class Scale:
    """A score's name in tables, what its raw value is multiplied by there, and the digits."""

    name: str
    factor: float
    digits: int

    def number(self, raw: float) -> str:
        """Write a raw value."""
        return f"{self.factor * raw:.{self.digits}f}"

    def interval(self, raw: Sequence[float]) -> str:
        """Write an interval of raw values."""
        low, high = map(self.number, raw)
        return f"{low} to {high}"


SCALES = {
    "BLEU": Scale("BLEU", 100, 1),
    "NIST": Scale("NIST", 1, 2),
    "METEOR": Scale("METEOR", 100, 1),
    "ROUGE_L": Scale("ROUGE-L", 100, 1),
    "CIDEr": Scale("CIDEr", 1, 2),
    "NLL": Scale("NLL", 1, 3),
}
TEXT_SCALES = {  # of any text, by their keys
    "exact_match": Scale("exact", 100, 1),
    "token_f1": Scale("F1", 100, 1),
    "chrf": Scale("chrF", 1, 1),
    "sacrebleu": Scale("sacreBLEU", 1, 1),
}
