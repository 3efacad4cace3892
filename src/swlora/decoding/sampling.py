"""The next token of one text, from its logits and its own seed alone.

    scores  = logits, those of seen tokens divided by the repetition penalty (multiplied where < 0),
              less frequency_penalty * c + presence_penalty * (c > 0), c = how often it was written
    p       = softmax(scores / temperature), of the top_k likeliest tokens
    nucleus = the likeliest tokens whose more likely ones sum to less than top_p
    token   = the first of the nucleus whose cumulative p exceeds u * p(nucleus),  u from the seed

The same order as in transformers: penalty (arXiv 1909.05858), temperature, top_k, nucleus
(1904.09751). The two other penalties are the OpenAI API's: they count what was written, not the
prompt. A token with p < (1 - top_p) / V lies outside the nucleus whatever the others are, since all
of those together hold less than 1 - top_p; so only the rest is sorted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

import numpy as np
import torch
from torch import Tensor

from swlora.errors import UserError


def own_seed(seed: int, number: int) -> int:
    """Return the seed, of 64 bits, of text `number` of those that one `seed`, 0 or more, is for."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy, `logprobs` how many alternatives to name.

    `top_k` 0 takes every token. `logprobs` None names no probabilities at all, 0 the chosen token's
    only. Raises UserError for settings that mean nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    top_k: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        heat, penalty = self.temperature, self.repetition_penalty
        if not (0 <= heat < inf and 0 < self.top_p <= 1 and 0 < penalty < inf):  # nor nan
            raise UserError(
                "sampling needs temperature >= 0, 0 < top_p <= 1 and repetition_penalty > 0"
            )
        if self.top_k < 0 or not isfinite(self.frequency_penalty + self.presence_penalty):
            raise UserError("sampling needs top_k >= 0 and finite penalties")
        if self.logprobs is not None and self.logprobs < 0:
            raise UserError("logprobs is how many alternatives to name, 0 or more")

    @property
    def is_argmax(self) -> bool:
        """Whether the token of the largest logit is all that is asked for."""
        return self.temperature == 0 and not self.has_penalties and self.logprobs is None

    @property
    def has_penalties(self) -> bool:
        """Whether scores depend on the tokens before."""
        return self.repetition_penalty != 1 or self.has_counts

    @property
    def has_counts(self) -> bool:
        """Whether scores depend on how often a token was written."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0


@dataclass(frozen=True)
class Choice:
    """A chosen token; probabilities are those of the model's own logits, in nats."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one text, one after the other."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._seen = list(dict.fromkeys(prompt)) if sampling.repetition_penalty != 1 else []
        self._written: Counter[int] = Counter()
        self._generator = None
        if sampling.temperature > 0:
            self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> Choice:
        """Choose from logits (V,); every call moves on by one token."""
        logits = logits.float()
        token_id = self._token(self._penalised(logits))
        if self.sampling.repetition_penalty != 1 and token_id not in self._seen:
            self._seen.append(token_id)
        if self.sampling.has_counts:
            self._written[token_id] += 1
        if self.sampling.logprobs is None:
            return Choice(token_id)
        return choice_with_logprobs(
            token_id, torch.log_softmax(logits, dim=-1), self.sampling.logprobs
        )

    def _penalised(self, logits: Tensor) -> Tensor:
        scores, own = logits, self.sampling
        if self._seen:
            seen = torch.tensor(self._seen, device=logits.device)
            score, penalty = logits[seen], own.repetition_penalty
            changed = torch.where(score < 0, score * penalty, score / penalty)
            scores = logits.index_copy(0, seen, changed)
        if self._written:
            written = torch.tensor(list(self._written), device=logits.device)
            counts = torch.tensor(list(self._written.values()), device=logits.device)
            less = own.frequency_penalty * counts + own.presence_penalty
            scores = scores.index_add(0, written, -less)
        return scores

    def _token(self, scores: Tensor) -> int:
        if self._generator is None:
            return int(scores.argmax())
        p = torch.softmax(scores / self.sampling.temperature, dim=-1)
        tokens = candidates(p, self.sampling.top_k, self.sampling.top_p)
        total = (p if tokens is None else p[tokens]).double().cumsum(0)
        u = torch.rand(1, dtype=torch.float64, generator=self._generator).to(p.device)
        at = int(torch.searchsorted(total, u * total[-1], right=True))
        if at == len(total):  # u * total rounded up to total
            at = int(torch.searchsorted(total, total[-1:]))
        return at if tokens is None else int(tokens[at])


class OwnDraws:
    """Leaves each text of a batch the one token that is drawn for it alone: a logits processor."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self._choosers = [Chooser(sampling, ()) for sampling in samplings]

    def __call__(self, _token_ids: Tensor, logits: Tensor) -> Tensor:
        """Return logits (B, V) of 0 for the tokens drawn from `logits`, and of -inf elsewhere."""
        rows = zip(self._choosers, logits, strict=True)
        drawn = torch.tensor([chooser.choose(row).token_id for chooser, row in rows])
        return torch.full_like(logits, -inf).scatter(1, drawn.to(logits.device)[:, None], 0.0)


def choice_with_logprobs(token_id: int, log_p: Tensor, n_alternatives: int) -> Choice:
    """Return a token with its log-probability among log_p (V,), and the likeliest tokens."""
    best = torch.topk(log_p, n_alternatives)
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Choice(token_id, float(log_p[token_id]), top)


def candidates(p: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """Return the tokens that may come, the likeliest first; None where all may.

    The nucleus is that of the `top_k` likeliest tokens' probabilities (0: of all), p (V,), made to
    sum to 1.
    """
    if not 0 < top_k < len(p):
        return nucleus(p, top_p) if top_p < 1 else None
    kept = torch.sort(p, descending=True, stable=True).indices[:top_k]
    return kept[nucleus(p[kept] / p[kept].sum(), top_p)] if top_p < 1 else kept


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Return the tokens of the nucleus of p (V,), the likeliest first; equals by their number."""
    (likely,) = torch.nonzero(p >= (1 - top_p) / len(p), as_tuple=True)
    ordered, order = torch.sort(p[likely], descending=True, stable=True)
    before = ordered.double().cumsum(0) - ordered
    return likely[order[before < top_p]]
