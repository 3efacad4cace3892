"""What an ablation looks like: the dose curve, and text written before and after.

The dose curve scales one weight by factors from 0 to 2. Perplexity alone can miss a collapse (a
model may loop long before its perplexity shows it), so the texts stand beside it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import exp
from typing import Any

import torch

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress, context_tokens
from swlora.processes import dealt, world
from swlora.progress import Progress, Silent
from swlora.superweights.ablate import zeroed
from swlora.superweights.meter import Meter, rise_nats

DOSES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
NEW_TOKENS = 24


@dataclass(frozen=True)
class Dose:
    """The text's perplexity with a weight scaled by `scale`, and its ratio to that at scale 1."""

    scale: float
    perplexity: float
    ratio: float


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
    token_ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.to(model.device)
    n_tokens, room = token_ids.shape[1], context_tokens(model) - max_new_tokens
    if not 0 < n_tokens <= room:
        raise UserError(
            f"a prompt has {n_tokens} tokens; with {max_new_tokens} new ones to follow it can "
            f"have 1 to {room}"
        )
    out = model.generate(
        input_ids=token_ids,
        attention_mask=torch.ones_like(token_ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    text_ids = takewhile(lambda token_id: token_id not in ends, out[0, n_tokens:].tolist())
    return str(tokenizer.decode(list(text_ids), skip_special_tokens=True))
