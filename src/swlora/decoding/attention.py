"""Attention of new tokens over cached ones.

    softmax(scale q k' + mask) v,   mask 0 where visible, MASKED elsewhere

Who sees what is a `Layout`: of slots that get a token each, of beams, or of a stretch of a prefix
tree. Heads that share a key head are rows of one product. Batched products over contiguous keys are
three times as fast on a CPU as its fused kernel with a mask.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from swlora.kernels.attention_interface import Scoring, additive_mask, attending
from swlora.kernels.wide import wide_dtype


class Layout(ABC):
    """Which cached tokens the queries of one forward pass see."""

    def __init__(self) -> None:
        self._masks: dict[int | None, Tensor] = {}

    @abstractmethod
    def visible(self, window: int | None) -> Tensor:
        """Return what is visible through a sliding window, as bool; its shape is the layout's."""

    @abstractmethod
    def expand(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return an additive mask of `visible`'s shape as one that fits `group`'s products."""

    @abstractmethod
    def group(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (N, M, h), k and v (N, K, h) of the batched products."""

    @abstractmethod
    def merge(self, out: Tensor, query: Tensor) -> Tensor:
        """Undo `group` for the products' result: (N, M, h) -> (B, T, H, h)."""

    def followed_by(self, model: Any, n_blocks: int) -> AbstractContextManager[None]:
        """Let the blocks of a model attend as this layout says in the body, all `n_blocks`."""
        refusal = "attend to the shared cache; this model cannot be decoded in batches"
        return attending(model.config, self.attend, n_blocks, refusal)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """Attend as the layout says; an `Attention`. Key and value are those of the whole cache."""
        mask = self._mask(scoring.window, query, key)
        scale, softcap = scoring.scale, scoring.softcap
        q, k, v = self.group(query, key, value)
        if softcap is None:
            scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
        else:
            capped = torch.tanh(torch.bmm(q, k.transpose(1, 2)) * (scale / softcap))
            scores = softcap * capped + mask
        p = torch.softmax(scores, dim=-1, dtype=wide_dtype(q.dtype)).to(q.dtype)
        return self.merge(torch.bmm(p, v), query)

    def _mask(self, window: int | None, query: Tensor, key: Tensor) -> Tensor:
        """Return the additive mask of the products, made once a window."""
        if window not in self._masks:
            visible = self.visible(window).to(query.device)
            mask = additive_mask(visible, query.dtype)
            self._masks[window] = self.expand(mask, query, key)
        return self._masks[window]
