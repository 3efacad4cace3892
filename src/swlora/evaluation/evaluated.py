"""What an evaluation found, as values: of a model's texts, or of outputs that already exist."""

from dataclasses import dataclass, field
from pathlib import Path

from swlora.config import DecodeSpec
from swlora.evaluation.bootstrap import SETTINGS, BootstrapSettings
from swlora.evaluation.scales import RAW_SCALE
from swlora.evaluation.scores import Scores
from swlora.evaluation.scoring import TextsScored
from swlora.evaluation.text_scores import TextScores
from swlora.loss_sum import LossSum
from swlora.result_json import FLAT, IF_ANY, NO_KEY, key


@dataclass(frozen=True)
class EnglishLoss:
    """The loss of English text before an adapter was there, and with it: what was forgotten."""

    perplexity_before: float = field(metadata=key("english_perplexity_before"))
    perplexity: float = field(metadata=key("english_perplexity"))
    sum_nats: float = field(metadata=key("english_sum_nats"))
    n_tokens: float = field(metadata=key("english_n_tokens"))
    windows_begin_with_bos: bool = field(metadata=key("english_windows_begin_with_bos"))


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A model's texts for every distinct prompt of a split, scored, and the references' loss.

    `nll` is in nats a trained token, `nll_per_row` the nats of a row. `intervals` are [low, high]
    of the scores and of "NLL", by their official names; {} for a single prompt, and without "NLL"
    where documents stand beside the prompts: prompts are what is drawn again. `scores` and
    `text_scores` are None where all rows are documents, which have no prompt; `english` where it
    was not measured, `own` where no metric of one's own was named, `predictions` where no file was
    asked for. `has_official` says whether the official five are scores for such data. `texts` are
    the prompts, predictions and references, for use in Python.
    """

    scores: Scores | None = field(metadata=FLAT)
    text_scores: TextScores | None = field(metadata=FLAT)
    own: dict[str, float] | None = field(default=None, metadata=IF_ANY)
    has_official: bool = field(default=True, metadata=key("has_official_scores"))
    nll: float
    nll_per_row: float
    n_rows: int
    nll_sum_nats: float
    n_tokens: float
    scale: str = RAW_SCALE
    intervals: dict[str, list[float]]
    bootstrap: BootstrapSettings = SETTINGS
    english: EnglishLoss | None = field(metadata=FLAT)
    n_prompts: int
    split: str
    decode: DecodeSpec
    data: str
    predictions: Path | None
    texts: TextsScored | None = field(default=None, repr=False, compare=False, metadata=NO_KEY)

    @property
    def loss(self) -> LossSum:
        """The summed loss of all references."""
        return LossSum(self.nll_sum_nats, self.n_tokens)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of a file of outputs; `intervals` as in `Evaluated`."""

    scores: Scores = field(metadata=FLAT)
    text_scores: TextScores = field(metadata=FLAT)
    scale: str = RAW_SCALE
    intervals: dict[str, list[float]]
    bootstrap: BootstrapSettings = SETTINGS
    n_prompts: int
    predictions: Path
    references: Path
