"""Attention of new tokens over cached ones, for unmodified transformers decoders.

    softmax(scale q k' + mask) v,   mask 0 where visible, MASKED elsewhere

Who sees what is a `Layout`: one for rows that get a token each, one for a stretch of a prefix tree.
Heads that share a key head are rows of one product. Batched products over contiguous keys are
three times as fast on a CPU as its fused kernel with a mask.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swlora.errors import RunFailedError
from swlora.kernels.tree_attention import MASKED

NAME = "swlora_decode"
_ACTIVE: ContextVar["Layout"] = ContextVar("swlora_decode_layout")


class Layout(ABC):
    """Which cached tokens the queries of one forward pass see."""

    def __init__(self) -> None:
        self.n_attentions = 0  # how many blocks followed this layout
        self._masks: dict[int | None, Tensor] = {}

    @abstractmethod
    def visible(self, window: int | None) -> Tensor:
        """Return what is visible through a sliding window, as bool; its shape is the layout's."""

    @abstractmethod
    def expanded(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return an additive mask of `visible`'s shape as one that fits `grouped`'s products."""

    @abstractmethod
    def grouped(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (N, M, h), k and v (N, K, h) of the batched products."""

    @abstractmethod
    def merged(self, out: Tensor, query: Tensor) -> Tensor:
        """Undo `grouped` for the products' result: (N, M, h) -> (B, T, H, h)."""

    def mask(self, window: int | None, query: Tensor, key: Tensor) -> Tensor:
        """Return the additive mask of the products, made once a window."""
        if window not in self._masks:
            visible = self.visible(window)
            mask = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
            mask.masked_fill_(~visible.to(query.device), MASKED)
            self._masks[window] = self.expanded(mask, query, key)
        return self._masks[window]


@contextmanager
def attending(config: Any, layout: Layout, n_blocks: int) -> Iterator[None]:
    """Let a model with this config attend as `layout` says, in all its blocks, in the body."""
    previous = config._attn_implementation
    token = _ACTIVE.set(layout)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = previous
        _ACTIVE.reset(token)
    if layout.n_attentions != n_blocks:
        raise RunFailedError(
            f"{layout.n_attentions} of {n_blocks} blocks attend to the shared cache; this model "
            "cannot be decoded in batches"
        )


def decode_attention_forward(
    module: torch.nn.Module,
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
    """Attend as the active layout says; the attention function registered with transformers.

    query (B, H, T, h), key and value (B, H_kv, K, h), the whole cache -> (B, T, H, h).
    """
    if attention_mask is not None or dropout:
        raise RunFailedError("batched decoding takes no mask and no attention dropout")
    del module
    layout = _ACTIVE.get()
    layout.n_attentions += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = layout.mask(sliding_window, query, key)
    q, k, v = layout.grouped(query, key, value)
    if softcap is None:
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
    else:
        scores = softcap * torch.tanh(torch.bmm(q, k.transpose(1, 2)) * (scale / softcap)) + mask
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    p = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    return layout.merged(torch.bmm(p, v), query), None


ALL_ATTENTION_FUNCTIONS.register(NAME, decode_attention_forward)
