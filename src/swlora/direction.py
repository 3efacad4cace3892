"""Which way each metric gets better: one table for all who ask for the best."""

from typing import Literal

from swlora.errors import UserError

Direction = Literal["lower", "higher"]

DIRECTION: dict[str, Direction] = {
    "loss": "lower",
    "nll": "lower",
    "perplexity": "lower",
    "bleu": "higher",
    "nist": "higher",
    "meteor": "higher",
    "rouge_l": "higher",
    "cider": "higher",
}


def higher_is_better(metric: str) -> bool:
    """Say whether more of `metric` is better; its name may be upper case.

    Raises UserError for a metric that is not in the table.
    """
    if metric.lower() not in DIRECTION:
        raise UserError(f"no metric is called {metric!r}; known are {', '.join(DIRECTION)}")
    return DIRECTION[metric.lower()] == "higher"


def is_better(metric: str, value: float, other: float) -> bool:
    """Say whether `value` of `metric` is better than `other`; equal ones are not."""
    return value > other if higher_is_better(metric) else value < other
