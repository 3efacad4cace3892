"""The next token of one row, from its logits and its own seed alone.

    scores  = logits, those of seen tokens divided by the repetition penalty (multiplied where < 0)
    p       = softmax(scores / temperature)
    nucleus = the likeliest tokens whose more likely ones sum to less than top_p
    token   = the first of the nucleus whose cumulative p exceeds u * p(nucleus),  u from the seed

The same order as in transformers: penalty (arXiv 1909.05858), temperature, nucleus (1904.09751).
A token with p < (1 - top_p) / V lies outside the nucleus whatever the others are, since all of
those together hold less than 1 - top_p; so only the rest is sorted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from swlora.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy, `logprobs` how many alternatives to name.

    `logprobs` None names no probabilities at all, 0 the chosen token's only. Raises UserError for
    settings that mean nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        heat, penalty = self.temperature, self.repetition_penalty
        if not (0 <= heat < inf and 0 < self.top_p <= 1 and 0 < penalty < inf):  # nor nan
            raise UserError(
                "sampling needs temperature >= 0, 0 < top_p <= 1 and repetition_penalty > 0"
            )
        if self.logprobs is not None and self.logprobs < 0:
            raise UserError("logprobs is how many alternatives to name, 0 or more")

    @property
    def is_argmax(self) -> bool:
        """Whether the token of the largest logit is all that is asked for."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.logprobs is None


@dataclass(frozen=True)
class Choice:
    """A chosen token; probabilities are those of the model's own logits, in nats."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one row, one after the other."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._seen = list(dict.fromkeys(prompt)) if sampling.repetition_penalty != 1 else []
        self._generator = None
        if sampling.temperature > 0:
            self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> Choice:
        """Choose from logits (V,); every call moves on by one token."""
        logits = logits.float()
        token_id = self._token(self._penalised(logits))
        if self.sampling.repetition_penalty != 1 and token_id not in self._seen:
            self._seen.append(token_id)
        if self.sampling.logprobs is None:
            return Choice(token_id)
        log_p = torch.log_softmax(logits, dim=-1)
        best = torch.topk(log_p, self.sampling.logprobs)
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Choice(token_id, float(log_p[token_id]), top)

    def _penalised(self, logits: Tensor) -> Tensor:
        if not self._seen:
            return logits
        seen = torch.tensor(self._seen, device=logits.device)
        score, penalty = logits[seen], self.sampling.repetition_penalty
        changed = torch.where(score < 0, score * penalty, score / penalty)
        return logits.index_copy(0, seen, changed)

    def _token(self, scores: Tensor) -> int:
        if self._generator is None:
            return int(scores.argmax())
        p = torch.softmax(scores / self.sampling.temperature, dim=-1)
        tokens = nucleus(p, self.sampling.top_p) if self.sampling.top_p < 1 else None
        total = (p if tokens is None else p[tokens]).double().cumsum(0)
        u = torch.rand(1, dtype=torch.float64, generator=self._generator).to(p.device)
        at = int(torch.searchsorted(total, u * total[-1], right=True))
        if at == len(total):  # u * total rounded up to total
            at = int(torch.searchsorted(total, total[-1:]))
        return at if tokens is None else int(tokens[at])


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Return the tokens of the nucleus of p (V,), the likeliest first; equals by their number."""
    (candidates,) = torch.nonzero(p >= (1 - top_p) / len(p), as_tuple=True)
    ordered, order = torch.sort(p[candidates], descending=True, stable=True)
    before = ordered.double().cumsum(0) - ordered
    return candidates[order[before < top_p]]
