"""A loss as it travels: a sum in nats and the tokens it covers. Means are made for printing only,
so that no result depends on batch size, accumulation or padding.
"""

from dataclasses import dataclass
from math import exp


def as_count(weights: float) -> float:
    """Return a sum of tokens' weights: an int where it is whole, as with weights of 0 and 1."""
    return int(weights) if float(weights).is_integer() else float(weights)


@dataclass(frozen=True)
class LossSum:
    """Summed negative log-likelihood over `n_tokens` tokens, a token of weight 0.5 being half."""

    sum_nats: float = 0.0
    n_tokens: float = 0

    def __add__(self, other: "LossSum") -> "LossSum":
        return LossSum(self.sum_nats + other.sum_nats, self.n_tokens + other.n_tokens)

    @property
    def nats_per_token(self) -> float:
        """Mean loss a token; ZeroDivisionError where nothing was scored."""
        return self.sum_nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; capped where it would overflow a float."""
        return exp(min(self.nats_per_token, 700.0))
