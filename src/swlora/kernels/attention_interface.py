"""The attention function that is registered with transformers, for unmodified decoders.

A decoder finds its attention by a name in its configuration. In the body of `attending` that is our
name, and every block's attention is what the body was given: along a prefix tree in training, over
a shared cache in decoding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swlora.errors import RunFailedError

NAME = "swlora"
MASKED = -1e30  # finite, so that padded queries, which see nothing, stay finite too


@dataclass(frozen=True)
class Scoring:
    """How scores are made of queries and keys: scale (q k'), and who is too far away to see.

    `window` is how far a token sees back, itself counted; scores are
    `softcap` * tanh(score / `softcap`) where that is given.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


# softmax(scores + mask) v: query (B, H, T, h), key and value (B, H_kv, K, h) -> (B, T, H, h); the
# function knows who sees whom.
Attention = Callable[[Tensor, Tensor, Tensor, Scoring], Tensor]


@dataclass
class _Pass:
    attention: Attention
    n_blocks: int = 0  # how many blocks attended by it


_ACTIVE: ContextVar[_Pass] = ContextVar("swlora_attention")


@contextmanager
def attending(config: Any, attention: Attention, n_blocks: int, refusal: str) -> Iterator[None]:
    """Let the blocks of a model with this config attend by `attention` while the body runs.

    Raises RunFailedError, "M of N blocks" and the refusal, unless `n_blocks` blocks did so: a block
    with a configuration of its own attends as transformers would.
    """
    previous = config._attn_implementation
    forward_pass = _Pass(attention)
    token = _ACTIVE.set(forward_pass)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = previous
        _ACTIVE.reset(token)
    if forward_pass.n_blocks != n_blocks:
        raise RunFailedError(f"{forward_pass.n_blocks} of {n_blocks} blocks {refusal}")


def attention_forward(
    module: torch.nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by the active attention; what transformers calls. No weights are returned."""
    if attention_mask is not None or dropout:
        raise RunFailedError("attention along a layout takes no mask, no attention dropout")
    active = _ACTIVE.get()
    active.n_blocks += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return active.attention(query, key, value, Scoring(scale, sliding_window, softcap)), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores: 0 where visible (bool), MASKED elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, MASKED)
