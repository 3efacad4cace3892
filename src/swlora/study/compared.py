"""What a study found, as values: what results.json holds, and what its tables and pictures show.

Every number of an arm is the mean over its finished seeds; an arm without one is an `ArmResult`
and no more. Scores are on the scales that papers use (see evaluation/scales).
"""

from dataclasses import dataclass, field
from typing import Any

from swlora.evaluation.bootstrap import BootstrapSettings
from swlora.result_json import FLAT, IF_ANY, NO_KEY, from_json


@dataclass(frozen=True)
class Scores:
    """BLEU, METEOR and ROUGE-L of 100, NIST, CIDEr, and nats a token; None where not measured."""

    bleu: float | None
    nist: float | None
    meteor: float | None
    rouge_l: float | None
    cider: float | None
    nll: float | None

    def __getitem__(self, name: str) -> float | None:
        """Return the score of that name; KeyError for none."""
        value: float | None = vars(self)[name]
        return value

    def measured(self, name: str) -> float:
        """Return a score that was measured; KeyError where it was not."""
        if (value := self[name]) is None:
            raise KeyError(name)
        return value


@dataclass(frozen=True)
class Spread:
    """How far the seeds of an arm lie apart; `sd` is None for one seed."""

    mean: float
    min: float
    max: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """An arm's score minus the baseline's, with its interval [low, high], and what that means.

    It is made of the `seeds` that both have; of all, unpaired, where they have none in common.
    """

    difference: float
    interval: list[float]
    verdict: str
    seeds: list[int]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Scores, their intervals [low, high] and spread, and what they say against the baseline."""

    scores: Scores = field(metadata=FLAT)
    intervals: dict[str, list[float]]
    spread: dict[str, Spread]
    against_baseline: dict[str, Difference]


@dataclass(frozen=True, kw_only=True)
class Beam(Quality):
    """The scores of an arm whose texts were made by beam search; `name` is the arm's."""

    name: str = field(metadata=NO_KEY)
    is_baseline: bool
    seeds: list[int]
    planned_seeds: list[int]
    decode: dict[str, Any]


@dataclass(frozen=True)
class TimeSpread:
    """How far the seeds' times lie apart."""

    train_s: Spread
    total_s: Spread
    examples_per_s: Spread


@dataclass(frozen=True, kw_only=True)
class Times:
    """Means over seeds of the seconds of training, to the end, and of the rate once warm."""

    train_s: float
    total_s: float
    examples_per_s: float
    time_spread: TimeSpread


@dataclass(frozen=True)
class Acceleration:
    """How much faster than the baseline, in three ways; None where something was not measured."""

    speed_up_percent: float
    time_saved_percent: float
    reached_baseline_nll: bool | None
    seconds_to_baseline_nll: float | None
    time_saved_to_baseline_nll_percent: float | None


@dataclass(frozen=True)
class LossCurve:
    """Loss in nats a token against seconds from the start; `kind` is "held-out" or "training"."""

    kind: str
    seconds: list[float]
    nll: list[float]


@dataclass(frozen=True)
class RateChoice:
    """The held-out NLL that each rate that was tried led to, and the rate that was taken.

    `untried`: a rate beyond the grid that failed, and why. What was not recorded is empty, or None.
    """

    grid: list[float] = field(default_factory=list, metadata=IF_ANY)
    nll: dict[str, float | None] = field(default_factory=dict, metadata=IF_ANY)
    cost_s: float | None = field(default=None, metadata=IF_ANY)
    chosen: float | None = field(default=None, metadata=IF_ANY)
    at_edge: bool | None = field(default=None, metadata=IF_ANY)
    untried: str | None = field(default=None, metadata=IF_ANY)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What an arm trained, the same for all its seeds; the memory is the most that one took."""

    method: str
    layers: list[int]
    rank: int | None
    rank_pattern: dict[str, int] | None
    targets: list[str]
    epochs: int
    learning_rate: float
    n_prompts: int
    n_trainable: int
    adapter_bytes: int | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class RunResult:
    """One seed of an arm."""

    seed: int
    train_s: float
    total_s: float
    examples_per_s: float
    scores: Scores = field(metadata=FLAT)


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """An arm, and which of its seeds are done; `same_as` is the arm whose runs are its own too."""

    name: str
    status: str
    policy: str | None
    control_of: str | None
    same_as: str | None
    is_baseline: bool
    seeds: list[int]
    planned_seeds: list[int]
    rate_choice: RateChoice | None


@dataclass(frozen=True, kw_only=True)
class FinishedArm(Quality, Times, Description, ArmResult):
    """An arm with a seed that is done at least; perplexities are of English text."""

    english_perplexity: float | None
    english_perplexity_before: float | None
    acceleration: Acceleration | None
    curve: LossCurve
    beam: Beam | None = field(metadata=IF_ANY)
    runs: list[RunResult]


@dataclass(frozen=True)
class Unfinished:
    """A run that came to nothing, and why as far as it is known."""

    run: str
    status: str
    reason: str | None


@dataclass(frozen=True)
class Published:
    """A row of the table that was published before."""

    method: str
    acceleration_percent: float | None
    quality: float


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A study: all of its arms against one baseline, within margins that were set before.

    `scores` says on which scales scores are, `setting` what all arms share.
    """

    study: str | None
    status: str
    baseline: str
    margin: dict[str, float]
    controls: bool
    scores: str
    bootstrap: BootstrapSettings
    setting: dict[str, Any]
    target_nll: float | None
    arms: list[ArmResult]
    unfinished: list[Unfinished]
    published: list[Published]

    @property
    def finished(self) -> list[FinishedArm]:
        """The arms with results."""
        return [arm for arm in self.arms if isinstance(arm, FinishedArm)]


@dataclass(frozen=True)
class ComparedModels:
    """The studies of a file with several models, by folder."""

    studies: dict[str, Compared]


def read_finished(results: Any) -> list[FinishedArm]:
    """Return the finished arms of what results.json holds, also of an older version's.

    What that did not write is None. Raises KeyError, TypeError or ValueError for another thing.
    """
    return [from_json(FinishedArm, arm, partial=True) for arm in results["arms"] if arm["seeds"]]
