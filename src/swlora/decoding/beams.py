"""Beam search for a changing set of prompts over one shared cache.

Of the likeliest continuations of a prompt's K beams, those among the first K that end are finished,
and the first K that do not end go on. A finished text scores log p / length^length_penalty; a
prompt is done when it has K finished texts and the best beam, at its present length, scores no
better than the worst of them, as in `generate` of transformers with early_stopping False. Beams
share the prompt and all that they have in common (`swlora.decoding.beam_cache`), and a prompt that
is done gives its place to the next one. In float32 the texts are those of transformers.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Any

import torch
from torch import Tensor

from swlora.adapters.base_model import base_model_of
from swlora.decoding.beam_cache import BeamCache
from swlora.decoding.forwards import decode_forwards
from swlora.decoding.prefill import PREFILL_TOKENS, TreePrefill
from swlora.errors import UserError
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.rotary import RotaryLengths
from swlora.models.anatomy import Anatomy, n_embeddings
from swlora.threads import adapt_threads

Continuation = tuple[float, int, int]  # log p of the text it makes, its beam, its token


@dataclass(frozen=True)
class BeamSettings:
    """How beams are searched; one beam is greedy search."""

    n_beams: int
    max_new_tokens: int
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass
class _Search:
    """The beams of one prompt, best first: their new tokens and their log p in nats."""

    prompt_id: int
    prompt: list[int]
    settings: BeamSettings
    texts: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    parents: list[int] = field(default_factory=list)  # what each continued in the last step
    finished: list[tuple[float, list[int]]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether no beam goes on, or none could be better than what is finished."""
        n_new, settings = len(self.texts[0]), self.settings
        if n_new == settings.max_new_tokens:
            return True
        best = self.scores[0] / n_new**settings.length_penalty
        return len(self.finished) == settings.n_beams and best <= self.finished[-1][0]

    def banned(self, beam: int) -> list[int]:
        """Return the tokens that would make an n-gram of prompt and text come twice."""
        n, ids = self.settings.no_repeat_ngram_size, self.prompt + self.texts[beam]
        end = ids[len(ids) - n + 1 :]
        starts = range(len(ids) - n + 1) if n else ()
        return [ids[i + n - 1] for i in starts if ids[i : i + n - 1] == end]

    def grow(self, likeliest: Sequence[Continuation], eos_token_ids: Collection[int]) -> None:
        """Take on the likeliest continuations of all beams, best first."""
        settings, n_new = self.settings, len(self.texts[0]) + 1
        going_on: list[Continuation] = []
        for rank, (score, beam, token) in enumerate(likeliest):
            ends = token in eos_token_ids
            if not ends:
                going_on.append((score, beam, token))
            if rank < settings.n_beams and (ends or n_new == settings.max_new_tokens):
                text = self.texts[beam] + ([] if ends else [token])
                self.finished.append((score / n_new**settings.length_penalty, text))
        self.finished = nlargest(settings.n_beams, self.finished, key=lambda entry: entry[0])
        going_on = going_on[: settings.n_beams]
        self.texts = [[*self.texts[beam], token] for _, beam, token in going_on]
        self.scores = [score for score, _, _ in going_on]
        self.parents = [beam for _, beam, _ in going_on]


class BeamDecoder:
    """Searches for up to `max_prompts` prompts together; the model must be in eval mode.

    `model` is a causal language model or a PeftModel of one, whose family has an attention
    interface; it is left as it is between the steps. Prompts and new tokens must fit the context.
    Raises UserError for more beams than the vocabulary has tokens to begin them with.
    """

    def __init__(
        self,
        model: Any,
        settings: BeamSettings,
        *,
        eos_token_ids: Collection[int],
        max_prompts: int,
    ) -> None:
        self._model = base_model_of(model)
        n_tokens = n_embeddings(self._model)
        if n_tokens < settings.n_beams + len(eos_token_ids):
            raise UserError(f"{n_tokens} tokens are too few for {settings.n_beams} beams")
        self._forwards = decode_forwards(model)
        self._settings, self._eos = settings, frozenset(eos_token_ids)
        self._max_prompts = max_prompts
        self._n_layers = Anatomy(self._model).n_layers
        self._rotary = RotaryLengths(self._model)
        self._cache = BeamCache(self._n_layers, settings.n_beams)
        self._searches: list[_Search] = []  # in the order of the cache

    @property
    def n_free(self) -> int:
        """Prompts that can still be admitted."""
        return self._max_prompts - len(self._searches)

    @torch.inference_mode()
    def admit(self, prompts: dict[int, Sequence[int]]) -> list[tuple[int, list[int]]]:
        """Run prompts (token ids by a number of their own); return those that are done at once.

        ValueError for more than `n_free` prompts, or one whose text may grow beyond a limit of its
        model's rotary frequencies.
        """
        if len(prompts) > self.n_free:
            raise ValueError("more prompts than there is room for")
        if not prompts:
            return []
        longest = max(map(len, prompts.values())) + self._settings.max_new_tokens
        if self._rotary.side(longest):
            raise ValueError("beams cannot grow beyond a limit of the rotary frequencies")
        new = [_Search(i, list(prompt), self._settings) for i, prompt in prompts.items()]
        with patched_forwards(self._forwards):
            starts = [search.prompt for search in new]
            prefill = TreePrefill(self._model, starts, self._n_layers, self._rotary)
            n_complete = 0
            while n_complete < len(new):
                complete, logits = prefill.advance(PREFILL_TOKENS)
                if complete:
                    self._grow([new[i] for i in complete], logits[:, None])
                n_complete += len(complete)
            self._cache.add([prefill.states(i) for i in range(len(new))])
        self._searches += new
        return self._take_done()

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[int]]]:
        """Make every beam one token longer; return (prompt, its best new tokens) of what is done.

        The token that ends a text is not part of it.
        """
        if not self._searches:
            return []
        adapt_threads()
        device = self._model.device
        tokens = torch.tensor([[text[-1] for text in s.texts] for s in self._searches])
        positions = torch.tensor(self._cache.lengths)[:, None].expand(tokens.shape)
        layout = self._cache.advance(torch.tensor([s.parents for s in self._searches]))
        followed = layout.followed_by(self._model, self._n_layers)
        with patched_forwards(self._forwards), followed:
            out = self._model(
                input_ids=tokens.to(device),
                position_ids=positions.to(device),
                past_key_values=self._cache,
                use_cache=True,
            )
        self._grow(self._searches, out.logits)
        return self._take_done()

    def _grow(self, searches: Sequence[_Search], logits: Tensor) -> None:
        """Continue the beams of N searches from their logits (N, beams, V)."""
        n_likeliest = (1 + len(self._eos)) * self._settings.n_beams
        log_p = torch.log_softmax(logits.float(), dim=-1)
        for i, search in enumerate(searches):
            for beam in range(len(search.texts)):
                if banned := search.banned(beam):
                    log_p[i, beam, banned] = -torch.inf
        n_of_beam = min(n_likeliest, log_p.shape[-1])
        scores, token_ids = log_p.topk(n_of_beam)  # (N, beams, n_of_beam)
        scores += torch.tensor([s.scores for s in searches], device=scores.device)[:, :, None]
        best, where = scores.flatten(1).topk(min(n_likeliest, scores[0].numel()))
        tokens = token_ids.flatten(1).gather(1, where)
        beams = where // n_of_beam
        for search, *columns in zip(
            searches, best.tolist(), beams.tolist(), tokens.tolist(), strict=True
        ):
            search.grow(list(zip(*columns, strict=True)), self._eos)

    def _take_done(self) -> list[tuple[int, list[int]]]:
        done = [(s.prompt_id, s.finished[0][1]) for s in self._searches if s.is_done]
        if done:
            kept = [i for i, search in enumerate(self._searches) if not search.is_done]
            self._cache.keep(kept)
            self._searches = [self._searches[i] for i in kept]
        return done
