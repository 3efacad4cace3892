"""Keys and values of a changing set of texts, each in a slot of one block, written in place.

A slot's tokens lie in columns of a ring, its newest where everybody's newest is:

    age of column c = (newest - c) mod C;   slot b sees c   iff   age < length_b (and age < window)

Attention does not depend on the order of keys, so nothing moves when texts grow, join or leave; the
block is laid out anew only when the longest text outgrows the ring, or becomes much shorter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from swlora.decoding.attention import Layout
from swlora.kernels.attention_interface import Scoring

FUSED_COLUMNS = 512  # up to here the fused operator is faster on a CPU than products, in bf16
MIN_ROOM = 32  # columns to spare when the ring is laid out; an eighth of the longest text if more


class SlotCache(Cache):  # type: ignore[misc]
    """Cache of up to `max_slots` texts, each one token longer after every forward pass.

    A slot takes 2 * layers * key heads * head width * bytes a number, times the length of the
    longest text plus its room (`MIN_ROOM`); slots come in powers of two. Empty, it holds no memory.
    """

    def __init__(self, n_layers: int, max_slots: int) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._n_layers, self._max_slots = n_layers, max_slots
        self._states: Tensor | None = None  # (layers, 2, slots, H_kv, C, h)
        self._column = 0  # where the next token goes
        self._of_layers: list[tuple[Tensor, ...]] = []  # views for the pass under way, see `update`

    @property
    def n_slots(self) -> int:
        """Slots in use."""
        return len(self.lengths)

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        return 0 if self._states is None else self._states.nbytes

    def add(self, texts: Sequence[Tensor]) -> None:
        """Give each text, keys and values (layers, 2, H_kv, length, h), the next slot."""
        if self._states is None:
            layers, two, n_heads, _, head_dim = texts[0].shape
            self._states = texts[0].new_empty(layers, two, 0, n_heads, 0, head_dim)
        longest = max([states.shape[3] for states in texts] + self.lengths)
        self._make_room(self.n_slots + len(texts), longest)
        assert self._states is not None
        for states in texts:
            slot, length = self._states[:, :, self.n_slots], states.shape[3]
            slot.zero_()  # what an earlier text left there must not come back as 0 * nan
            columns = torch.arange(self._column - length, self._column, device=states.device)
            slot.index_copy_(3, columns % slot.shape[3], states)
            self.lengths.append(length)

    def remove(self, slot: int) -> None:
        """Free a slot; the text in the last one takes its place."""
        self._of_layers = []
        last = self.n_slots - 1
        if last == 0:
            self._states = None
        elif slot != last:
            assert self._states is not None
            self._states[:, :, slot] = self._states[:, :, last]
        self.lengths[slot] = self.lengths[last]
        self.lengths.pop()

    def advance(self) -> "SlotLayout":
        """Make every text one token longer; the forward pass that follows fills that token in."""
        self._make_room(self.n_slots, max(self.lengths))
        assert self._states is not None
        self.lengths = [length + 1 for length in self.lengths]
        n_columns = self._states.shape[4]
        lengths = torch.tensor(self.lengths, device=self._states.device)
        layout = SlotLayout(lengths, self._column, n_columns)
        used = self._states[:, :, : self.n_slots]
        by_layer = zip(used[..., self._column, :].unbind(), used.unbind(), strict=True)
        self._of_layers = [(*newest.unbind(), *whole.unbind()) for newest, whole in by_layer]
        self._column = (self._column + 1) % n_columns
        return layout

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a block's key and value (B, H_kv, 1, h); return all columns, (B, H_kv, C, h)."""
        new_key, new_value, keys, values = self._of_layers[layer_idx]
        new_key.copy_(key_states.squeeze(2))
        new_value.copy_(value_states.squeeze(2))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return the tokens of the longest text before the forward pass that is under way."""
        return max(self.lengths, default=1) - 1

    def _make_room(self, n_slots: int, longest: int) -> None:
        """Make the block hold `n_slots` slots and, in each, one token more than `longest`."""
        assert self._states is not None
        held_slots, held_columns = self._states.shape[2], self._states.shape[4]
        room = max(MIN_ROOM, longest // 8)
        if n_slots <= held_slots and longest < held_columns <= 2 * (longest + room):
            return
        columns = longest + room
        n_held = held_slots
        while n_held < n_slots:
            n_held = min(max(1, 2 * n_held), self._max_slots)
        shape = list(self._states.shape)
        shape[2], shape[4] = n_held, columns
        kept = max(self.lengths, default=0)
        old, self._states = self._states, self._states.new_zeros(shape)
        if kept:
            source = torch.arange(self._column - kept, self._column, device=old.device)
            newest = old[:, :, : self.n_slots].index_select(4, source % held_columns)
            self._states[:, :, : self.n_slots, :, :kept] = newest
        self._column = kept


class SlotLayout(Layout):
    """One new token a slot, which sees its slot; lengths (B,) count the new token."""

    def __init__(self, lengths: Tensor, newest: int, n_columns: int) -> None:
        super().__init__()
        self.lengths = lengths
        self._age = (newest - torch.arange(n_columns, device=lengths.device)) % n_columns

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attend as the layout says; a short text alone by one fused operator."""
        alone = query.shape[0] == 1 and key.shape[2] <= FUSED_COLUMNS and scoring.softcap is None
        if not alone:
            return super().attend(query, key, value, scoring)
        mask = self._mask(scoring.window, query, key)[None]  # (1, H_kv, 1, C)
        q = query.reshape(1, key.shape[1], -1, key.shape[3])  # a head's queries as its rows
        out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scoring.scale)
        return out.reshape(1, 1, query.shape[1], query.shape[3])

    def visible(self, window: int | None) -> Tensor:
        """Return (B, C)."""
        reach = self.lengths if window is None else self.lengths.clamp(max=window)
        return self._age < reach[:, None]

    def expand(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG002
        """(B, C) -> (B * H_kv, 1, C)."""
        return mask.repeat_interleave(key.shape[1], dim=0)[:, None]

    def group(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B * H_kv, G, h) and twice (B * H_kv, C, h)."""
        n_products, head_dim = key.shape[0] * key.shape[1], key.shape[3]
        q = query.reshape(n_products, -1, head_dim)
        return q, key.view(n_products, -1, head_dim), value.view(n_products, -1, head_dim)

    def merge(self, out: Tensor, query: Tensor) -> Tensor:
        """(B * H_kv, G, h) -> (B, 1, H, h)."""
        return out.view(query.shape[0], 1, query.shape[1], query.shape[3])
