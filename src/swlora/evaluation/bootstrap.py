"""How sure scores are: intervals from drawing the evaluated prompts again, with replacement.

Scores are made anew from what was measured of each prompt, so a thousand draws take a fraction of a
second and neither a model nor Java.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.float64]

N_DRAWS = 1000
BOOTSTRAP_SEED = 0
CONFIDENCE = 0.95
FEW_PROMPTS = 30  # fewer make intervals too narrow: the draws know nothing but these prompts


@dataclass(frozen=True)
class BootstrapSettings:
    """What is needed to draw the same again."""

    draws: int
    seed: int
    confidence: float


SETTINGS = BootstrapSettings(N_DRAWS, BOOTSTRAP_SEED, CONFIDENCE)


class Interval(NamedTuple):
    """The middle `CONFIDENCE` of the draws."""

    low: float
    high: float


def prompt_weights(n_prompts: int, n_draws: int = N_DRAWS) -> Draws:
    """Return how often each draw holds each prompt, (R, n); the same at every call."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    shares = np.full(n_prompts, 1 / n_prompts)
    return rng.multinomial(n_prompts, shares, size=n_draws).astype(np.float64)


def interval(draws: Draws) -> Interval:
    """Return the percentile interval of the draws of a score or of a paired difference."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))


def score_intervals(
    resampled: Callable[[Draws], dict[str, Draws]], n_prompts: int
) -> dict[str, list[float]]:
    """Return [low, high] of every score; {} for a single prompt, whose draws are all the same.

    `resampled` takes weights (R, n_prompts) and returns the scores (R,) of the R draws, by name.
    """
    if n_prompts < 2:
        return {}
    draws = resampled(prompt_weights(n_prompts))
    return {name: list(interval(values)) for name, values in draws.items()}
