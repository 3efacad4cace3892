"""Keys and values of a changing set of rows, in one block of memory that is written in place.

A row's tokens lie in columns of a ring, its newest where everybody's newest is:

    age of column c = (newest - c) mod C;   row b sees c   iff   age < length_b (and age < window)

Attention does not depend on the order of keys, so nothing moves when rows grow, join or leave; the
block is laid out anew only when the longest row outgrows the ring, or becomes much shorter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from swlora.decoding.attention import Layout

MIN_ROOM = 32  # columns to spare when the ring is laid out; an eighth of the longest row if more


class RowCache(Cache):  # type: ignore[misc]
    """Cache of up to `max_rows` rows, each one token longer after every forward pass.

    A row takes 2 * layers * key heads * head width * bytes a number, times the length of the
    longest row plus its room (`MIN_ROOM`); rows come in powers of two. Empty, it holds no memory.
    """

    def __init__(self, n_layers: int, max_rows: int) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._n_layers, self._max_rows = n_layers, max_rows
        self._states: Tensor | None = None  # (layers, 2, rows, H_kv, C, h)
        self._column = 0  # where the next token goes

    @property
    def n_rows(self) -> int:
        """Rows held."""
        return len(self.lengths)

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        return 0 if self._states is None else self._states.nbytes

    def add(self, rows: Sequence[Tensor]) -> None:
        """Add rows of keys and values (layers, 2, H_kv, length, h) behind the others."""
        if self._states is None:
            layers, two, n_heads, _, head_dim = rows[0].shape
            self._states = rows[0].new_empty(layers, two, 0, n_heads, 0, head_dim)
        longest = max([row.shape[3] for row in rows] + self.lengths)
        self._make_room(self.n_rows + len(rows), longest)
        assert self._states is not None
        for states in rows:
            row, length = self._states[:, :, self.n_rows], states.shape[3]
            row.zero_()  # what an earlier row left there must not come back as 0 * nan
            columns = torch.arange(self._column - length, self._column, device=states.device)
            row.index_copy_(3, columns % row.shape[3], states)
            self.lengths.append(length)

    def remove(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = self.n_rows - 1
        if last == 0:
            self._states = None
        elif row != last:
            assert self._states is not None
            self._states[:, :, row] = self._states[:, :, last]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def advance(self) -> "RowLayout":
        """Make every row one token longer; the forward pass that follows fills that token in."""
        self._make_room(self.n_rows, max(self.lengths))
        assert self._states is not None
        self.lengths = [length + 1 for length in self.lengths]
        n_columns = self._states.shape[4]
        lengths = torch.tensor(self.lengths, device=self._states.device)
        layout = RowLayout(lengths, self._column, n_columns)
        self._column = (self._column + 1) % n_columns
        return layout

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a block's key and value (B, H_kv, 1, h); return all columns, (B, H_kv, C, h)."""
        assert self._states is not None
        keys, values = self._states[layer_idx, :, : self.n_rows]
        newest = self._column - 1  # -1 is the last column, where the ring has just closed
        keys[:, :, newest] = key_states[:, :, 0]
        values[:, :, newest] = value_states[:, :, 0]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return the tokens of the longest row before the forward pass that is under way."""
        return max(self.lengths, default=1) - 1

    def _make_room(self, n_rows: int, longest: int) -> None:
        """Make the block hold `n_rows` rows and, in each, one token more than `longest`."""
        assert self._states is not None
        held_rows, held_columns = self._states.shape[2], self._states.shape[4]
        room = max(MIN_ROOM, longest // 8)
        if n_rows <= held_rows and longest < held_columns <= 2 * (longest + room):
            return
        columns = longest + room
        rows = held_rows
        while rows < n_rows:
            rows = min(max(1, 2 * rows), self._max_rows)
        shape = list(self._states.shape)
        shape[2], shape[4] = rows, columns
        kept = max(self.lengths, default=0)
        old, self._states = self._states, self._states.new_zeros(shape)
        if kept:
            source = torch.arange(self._column - kept, self._column, device=old.device)
            newest = old[:, :, : self.n_rows].index_select(4, source % held_columns)
            self._states[:, :, : self.n_rows, :, :kept] = newest
        self._column = kept


class RowLayout(Layout):
    """One new token a row, which sees its row; lengths (B,) count the new token."""

    def __init__(self, lengths: Tensor, newest: int, n_columns: int) -> None:
        super().__init__()
        self.lengths = lengths
        self._age = (newest - torch.arange(n_columns, device=lengths.device)) % n_columns

    def visible(self, window: int | None) -> Tensor:
        """Return (B, C)."""
        reach = self.lengths if window is None else self.lengths.clamp(max=window)
        return self._age < reach[:, None]

    def expanded(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG002
        """(B, C) -> (B * H_kv, 1, C)."""
        return mask.repeat_interleave(key.shape[1], dim=0)[:, None]

    def grouped(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B * H_kv, G, h) and twice (B * H_kv, C, h)."""
        n_products, head_dim = key.shape[0] * key.shape[1], key.shape[3]
        q = query.reshape(n_products, -1, head_dim)
        return q, key.view(n_products, -1, head_dim), value.view(n_products, -1, head_dim)

    def merged(self, out: Tensor, query: Tensor) -> Tensor:
        """(B * H_kv, G, h) -> (B, 1, H, h)."""
        return out.view(query.shape[0], 1, query.shape[1], query.shape[3])
