"""Greedy and sampled generation for a changing set of texts over one shared cache.

`admit` takes requests, `step` gives the text in every slot one token, `drop` forgets a request. New
prompts are run as one prefix tree, a bounded stretch of it a step, so that a long one does not hold
up the others; a text that is done leaves its slot at once, and no product is computed for it any
more. What a text says depends on its request alone, not on its company (up to the rounding of sums,
which differ with the number of slots). In float32, greedy texts are what `generate` of transformers
says.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from swlora.adapters.base_model import base_model_of
from swlora.decoding.forwards import decode_forwards
from swlora.decoding.prefill import PREFILL_TOKENS, TreePrefill
from swlora.decoding.sampling import Choice, Chooser, Sampling
from swlora.decoding.slot_cache import SlotCache
from swlora.errors import UserError
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.rotary import RotaryLengths
from swlora.models.anatomy import Anatomy, context_tokens, n_embeddings
from swlora.plural import counted
from swlora.threads import adapt_threads

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class DecodeRequest:
    """A text that is asked for: continue `prompt` (token ids) by up to `max_new_tokens`.

    `stop_token_ids` end the text as the end-of-sequence tokens do. `prompt_logprobs` asks for the
    probabilities of the prompt's own tokens, with so many alternatives named.
    """

    request_id: int
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: Collection[int] = ()
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Event:
    """One new token of a request; `finish_reason` says that it is the last one, and why.

    The token that ends a text is part of its events. `logprob` and `top_logprobs`, (token id, nats)
    from the likeliest on, are there where the request's sampling asks for them. `prompt` comes with
    the first token where it was asked for: the prompt's tokens, the first one without probability.
    """

    request_id: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    prompt: tuple[Choice, ...] = ()


class _Text:
    """A request at work: what it says next, and whether that ends it."""

    def __init__(self, request: DecodeRequest, eos_token_ids: frozenset[int]) -> None:
        self.request = request
        self.chooser = Chooser(request.sampling, request.prompt)
        self.new_tokens: list[int] = []
        self._eos = eos_token_ids

    @property
    def token_ids(self) -> list[int]:
        """The prompt and what has been said."""
        return [*self.request.prompt, *self.new_tokens]

    def take(self, choice: Choice) -> Event:
        """Add a token."""
        token_id = choice.token_id
        self.new_tokens.append(token_id)
        reason: FinishReason | None = None
        if token_id in self._eos:
            reason = "eos"
        elif token_id in self.request.stop_token_ids:
            reason = "stop"
        elif len(self.new_tokens) == self.request.max_new_tokens:
            reason = "length"
        id_ = self.request.request_id
        return Event(id_, token_id, choice.logprob, choice.top_logprobs, reason)


class BatchDecoder:
    """Continues up to `max_slots` requests together; the model must be in eval mode.

    `model` is a causal language model or a PeftModel of one, in the state in which its texts shall
    see it (active adapter); it is left as it is between the steps. Memory: see `SlotCache`; while
    prompts are run, their distinct tokens take as much again. Raises UserError for a family whose
    attention cannot be replaced.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Collection[int],
        max_slots: int,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        if max_slots < 1 or prefill_tokens < 1:
            raise ValueError("max_slots and prefill_tokens must be at least 1")
        self._model = base_model_of(model)
        anatomy = Anatomy(self._model)
        if not anatomy.family.has_attention_interface:
            name = self._model.config.model_type
            raise UserError(f"{name} models cannot be decoded in changing batches")
        self._forwards = decode_forwards(model)
        self._eos = frozenset(eos_token_ids)
        self._max_slots, self._prefill_tokens = max_slots, prefill_tokens
        self._n_layers, self._context = anatomy.n_layers, context_tokens(self._model)
        self._n_tokens = n_embeddings(self._model)
        self._cache = SlotCache(anatomy.n_layers, max_slots)
        self._rotary = RotaryLengths(self._model)
        self._slots: list[_Text] = []  # the texts in the cache's slots, in its order
        self._waiting: deque[_Text] = deque()
        self._prefill: TreePrefill | None = None
        self._prefilled: list[_Text | None] = []  # None: dropped, or at work already

    @property
    def n_requests(self) -> int:
        """Requests admitted and not finished."""
        return len(self._slots) + len(self._waiting) + sum(r is not None for r in self._prefilled)

    @property
    def n_free(self) -> int:
        """Requests that can still be admitted."""
        return self._max_slots - self.n_requests

    def admit(self, requests: Sequence[DecodeRequest]) -> None:
        """Take requests on, all or none; their first tokens come with the steps that follow.

        Raises UserError for a request that the model has no room for or cannot read, ValueError
        for more than `n_free` requests or an id that is in use.
        """
        used = {text.request.request_id for text in self._all_texts()}
        ids = [request.request_id for request in requests]
        if len(requests) > self.n_free or len(used.union(ids)) < len(used) + len(ids):
            raise ValueError("more requests than there is room for, or a request_id used twice")
        for request in requests:
            self._check(request)
        self._waiting.extend(_Text(request, self._eos) for request in requests)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Give the text in every slot one token and run a stretch of the prompts that wait."""
        adapt_threads()
        with patched_forwards(self._forwards):
            self._turn_back()
            events = self._decode() if self._slots else []
            if self._prefill is None and self._waiting:
                self._start_prefill()
            if self._prefill is not None:
                events += self._advance_prefill(self._prefill)
        return events

    @torch.inference_mode()
    def drop(self, request_id: int) -> None:
        """Forget a request, wherever it stands; KeyError where there is none."""
        for text in self._all_texts():
            if text.request.request_id == request_id:
                break
        else:
            raise KeyError(request_id)
        if text in self._waiting:
            self._waiting.remove(text)
        elif text in self._slots:
            self._remove(self._slots.index(text))
        else:
            self._prefilled[self._prefilled.index(text)] = None
            self._end_prefill()

    def _all_texts(self) -> list[_Text]:
        prefilled = (text for text in self._prefilled if text is not None)
        return [*self._slots, *self._waiting, *prefilled]

    def _check(self, request: DecodeRequest) -> None:
        n_prompt, n_new = len(request.prompt), request.max_new_tokens
        if n_prompt < 1 or n_new < 1:
            raise UserError("a request needs a prompt token and a new token at least")
        n_read = n_prompt if n_new == 1 else n_prompt + n_new
        if n_read > self._context:  # a prompt that is only scored may fill it
            raise UserError(
                f"a prompt of {counted(n_prompt, 'token')} and {n_new} new ones exceed the model's "
                f"context of {self._context}"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._n_tokens:
            raise UserError(f"a prompt holds a token that is not one of 0..{self._n_tokens - 1}")

    def _turn_back(self) -> None:
        """Let texts whose next token makes the model turn all positions anew wait as prompts."""
        if not self._rotary.recomputes:
            return
        side = self._rotary.side
        for i in reversed([i for i, n in enumerate(self._cache.lengths) if side(n) < side(n + 1)]):
            self._waiting.appendleft(self._slots[i])
            self._remove(i)

    def _decode(self) -> list[Event]:
        device = self._model.device
        positions = torch.tensor(self._cache.lengths, device=device)[:, None]
        tokens = torch.tensor([text.new_tokens[-1] for text in self._slots], device=device)[:, None]
        turned = self._rotary.turning(positions + 1)
        with self._cache.advance().followed_by(self._model, self._n_layers), turned:
            out = self._model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        events = _choose(self._slots, out.logits[:, -1])
        for i in reversed([i for i, event in enumerate(events) if event.finish_reason]):
            self._remove(i)
        return events

    def _remove(self, i: int) -> None:
        self._cache.remove(i)
        self._slots[i] = self._slots[-1]  # as the cache does
        self._slots.pop()

    def _start_prefill(self) -> None:
        sides = [self._rotary.side(len(text.token_ids)) for text in self._waiting]
        with_sides = list(zip(sides, self._waiting, strict=True))
        together = [text for side, text in with_sides if side == sides[0]]
        self._waiting = deque(text for side, text in with_sides if side != sides[0])
        self._prefilled = list(together)
        wanted = {i: text.request.prompt_logprobs for i, text in enumerate(together)}
        scored = {i: n for i, n in wanted.items() if n is not None and not together[i].new_tokens}
        prompts = [text.token_ids for text in together]
        self._prefill = TreePrefill(self._model, prompts, self._n_layers, self._rotary, scored)

    def _advance_prefill(self, prefill: TreePrefill) -> list[Event]:
        complete, logits = prefill.advance(self._prefill_tokens)
        places = [(n, i, self._prefilled[i]) for n, i in enumerate(complete)]
        present = [(n, i, text) for n, i, text in places if text is not None]
        texts = [text for _, _, text in present]
        events = _choose(texts, logits[[n for n, _, _ in present]])
        events = [
            replace(event, prompt=prefill.scores(i))
            for event, (_, i, _) in zip(events, present, strict=True)
        ]
        going_on = []
        for event, (_, i, text) in zip(events, present, strict=True):
            self._prefilled[i] = None
            if event.finish_reason is None:
                going_on.append(prefill.states(i))
                self._slots.append(text)
        if going_on:
            self._cache.add(going_on)
        self._end_prefill()
        return events

    def _end_prefill(self) -> None:
        if not any(self._prefilled):
            self._prefill, self._prefilled = None, []


def _choose(texts: Sequence[_Text], logits: Tensor) -> list[Event]:
    """Choose each text's next token from logits (B, V)."""
    greedy = [i for i, text in enumerate(texts) if text.request.sampling.is_argmax]
    best: dict[int, int] = {}
    if greedy:
        of_greedy = logits if len(greedy) == len(texts) else logits[greedy]
        best = dict(zip(greedy, of_greedy.float().argmax(dim=-1).tolist(), strict=True))
    return [
        text.take(Choice(best[i]) if i in best else text.chooser.choose(logits[i]))
        for i, text in enumerate(texts)
    ]
