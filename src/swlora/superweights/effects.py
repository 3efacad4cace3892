"""What an ablation looks like: the dose curve, and text written before and after.

The dose curve scales one weight by factors from 0 to 2. Perplexity alone can miss a collapse (a
model may loop long before its perplexity shows it), so the texts stand beside it: written by the
intact model and with the weight at zero, or at every dose.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import exp
from typing import Any

import torch

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress, context_tokens
from swlora.plural import counted
from swlora.processes import dealt, world
from swlora.progress import Progress, Silent
from swlora.superweights.ablate import scaled, zeroed
from swlora.superweights.meter import Meter, rise_nats

DOSES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
NEW_TOKENS = 24
CHECKED_TOKENS = 48  # long enough for loops to show
RUN_TOKENS = 4


@dataclass(frozen=True)
class Dose:
    """The text's perplexity with a weight scaled by `scale`, and its ratio to that at scale 1."""

    scale: float
    perplexity: float
    ratio: float


@dataclass(frozen=True)
class DoseText:
    """What a prompt is continued with, greedily, with a weight scaled by `scale`.

    `same_tokens` are its first tokens that the model as it is writes too, of `n_tokens` at most;
    `repeats_after` tokens, the last `RUN_TOKENS` of them stood in the text once before, None where
    that never happens.
    """

    scale: float
    prompt: str
    text: str
    n_tokens: int
    same_tokens: int
    repeats_after: int | None


@dataclass(frozen=True)
class Generation:
    """What a prompt is continued with before and after the ablation, greedily."""

    prompt: str
    before: str
    after: str


def dose_curve(
    meter: Meter,
    address: WeightAddress,
    scales: Sequence[float] = DOSES,
    *,
    progress: Progress | None = None,
) -> tuple[Dose, ...]:
    """Measure the text with the weight scaled by every factor; 1 is the model as it is."""
    if not scales:
        raise UserError("a dose curve needs at least one scale")
    meter.anatomy.weight_view(address)  # raises UserError before the work
    base = meter.measure({}, keep=[address.layer])
    doses = []
    with (progress or Silent()).task(f"dose curve of {address}", len(scales)) as task:
        for scale in scales:
            losses = meter.measure({address: scale})
            ratio = exp(rise_nats(base, losses))
            doses.append(Dose(scale, losses.total.perplexity, ratio))
            task.advance(1, f"scale {scale:g}")
    return tuple(doses)


@torch.inference_mode()
def dose_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    address: WeightAddress,
    scales: Sequence[float] = DOSES,
    *,
    end_token_ids: Collection[int],
    max_new_tokens: int = CHECKED_TOKENS,
    progress: Progress | None = None,
) -> tuple[DoseText, ...]:
    """Continue every prompt greedily with the weight scaled by every factor.

    Prompt after prompt, the scales of each in their order. Raises UserError where a prompt does not
    fit, and where 1, the model as it is, is not among the scales.
    """
    if 1.0 not in scales:
        raise UserError("texts are compared with those at scale 1, which is not among the scales")
    anatomy = Anatomy(model)
    pairs = [(prompt, scale) for prompt in prompts for scale in scales]
    with (progress or Silent()).task("write at every dose", len(pairs)) as task:

        def written(pair: tuple[str, float]) -> list[int]:
            prompt, scale = pair
            with scaled(anatomy, {address: scale}):
                token_ids = _continued(model, tokenizer, prompt, end_token_ids, max_new_tokens)
            task.advance(world().size, f"scale {scale:g}")
            return token_ids

        texts = dict(zip(pairs, dealt(pairs, written), strict=True))
    return tuple(
        DoseText(
            scale,
            prompt,
            _decoded(tokenizer, ids),
            len(ids),
            _n_same(ids, texts[prompt, 1.0]),
            repeats_after(ids),
        )
        for (prompt, scale), ids in texts.items()
    )


def repeats_after(token_ids: Sequence[int]) -> int | None:
    """Return how many tokens there are when their last four come a second time; None for never."""
    seen: set[tuple[int, ...]] = set()
    for end in range(RUN_TOKENS, len(token_ids) + 1):
        run = tuple(token_ids[end - RUN_TOKENS : end])
        if run in seen:
            return end
        seen.add(run)
    return None


def _n_same(token_ids: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(token_ids, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@torch.inference_mode()
def generations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    addresses: Sequence[WeightAddress],
    *,
    end_token_ids: Collection[int],
    max_new_tokens: int = NEW_TOKENS,
    progress: Progress | None = None,
) -> tuple[Generation, ...]:
    """Continue every prompt greedily with the model as it is and with the addresses zero.

    Raises UserError where there is no prompt or no address, or a prompt does not fit.
    """
    if not prompts:
        raise UserError("no prompt was given to be continued")
    anatomy = Anatomy(model)
    with (progress or Silent()).task("write before and after", len(prompts)) as task:

        def around(prompt: str) -> tuple[str, str]:
            before = _continuation(model, tokenizer, prompt, end_token_ids, max_new_tokens)
            with zeroed(anatomy, addresses):
                after = _continuation(model, tokenizer, prompt, end_token_ids, max_new_tokens)
            task.advance(world().size)
            return before, after

        texts = dealt(prompts, around)
    return tuple(Generation(prompt, *pair) for prompt, pair in zip(prompts, texts, strict=True))


def _continuation(
    model: Any, tokenizer: Any, prompt: str, ends: Collection[int], max_new_tokens: int
) -> str:
    return _decoded(tokenizer, _continued(model, tokenizer, prompt, ends, max_new_tokens))


def _decoded(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _continued(
    model: Any, tokenizer: Any, prompt: str, ends: Collection[int], max_new_tokens: int
) -> list[int]:
    token_ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.to(model.device)
    n_tokens, room = token_ids.shape[1], context_tokens(model) - max_new_tokens
    if not 0 < n_tokens <= room:
        raise UserError(
            f"a prompt has {counted(n_tokens, 'token')}; with {max_new_tokens} new ones to follow "
            f"it can have 1 to {room}"
        )
    out = model.generate(
        input_ids=token_ids,
        attention_mask=torch.ones_like(token_ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    return list(takewhile(lambda token_id: token_id not in ends, out[0, n_tokens:].tolist()))
