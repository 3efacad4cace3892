"""Keys and values of beams, each prompt's once, and each token that beams share once.

A prompt's beams are the leaves of one tree. Its tokens lie in columns in any order, and a mask says
which of them a beam sees: all of the prompt, and its own ancestors.

    sees[n, b] after a step = sees[n, parent of b] and the column of b's new token

When beams are exchanged, rows of the mask are, and no key moves. A column that no beam sees any
more takes a new token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from swlora.decoding.attention import Layout

MIN_ROOM = 64  # columns more than are needed when the block is laid out


class BeamCache(Cache):  # type: ignore[misc]
    """Cache of prompts with `n_beams` beams each, all one token longer after a forward pass.

    A prompt takes 2 * layers * key heads * head width * bytes a number for each column; columns are
    at most twice as many as the prompt with the most tokens needs, and some to spare.
    """

    def __init__(self, n_layers: int, n_beams: int) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []  # of the beams of each prompt, the prompt counted
        self._n_layers, self._n_beams = n_layers, n_beams
        self._states: Tensor | None = None  # (layers, 2, N, H_kv, C, h)
        self._sees = torch.zeros(0, n_beams, 0, dtype=torch.bool)  # (N, beams, C)
        self._depth = torch.zeros(0, 0, dtype=torch.int64)  # (N, C), of the token in a column
        self._columns = torch.zeros(0, n_beams, dtype=torch.int64)  # of the newest tokens

    @property
    def n_prompts(self) -> int:
        """Prompts held."""
        return len(self.lengths)

    @property
    def n_columns(self) -> int:
        """Columns of every prompt, C."""
        return int(self._sees.shape[2])

    def add(self, prompts: Sequence[Tensor]) -> None:
        """Add prompts of keys and values (layers, 2, H_kv, length, h), seen by all their beams."""
        n, longest = len(prompts), max(states.shape[3] for states in prompts)
        if self._states is None:
            layers, two, n_heads, _, head_dim = prompts[0].shape
            self._states = prompts[0].new_zeros(layers, two, 0, n_heads, 0, head_dim)
        self._widen(longest + self._n_beams)
        old = self._states
        self._states = old.new_zeros(*old.shape[:2], self.n_prompts + n, *old.shape[3:])
        self._states[:, :, : self.n_prompts] = old
        sees = torch.zeros(n, self._n_beams, self.n_columns, dtype=torch.bool)
        depth = torch.arange(self.n_columns).repeat(n, 1)
        for i, states in enumerate(prompts):
            length = states.shape[3]
            self._states[:, :, self.n_prompts + i, :, :length] = states
            sees[i, :, :length] = True
        self._sees = torch.cat([self._sees, sees])
        self._depth = torch.cat([self._depth, depth])
        self.lengths += [states.shape[3] for states in prompts]

    def keep(self, kept: Sequence[int]) -> None:
        """Forget all prompts but these, which take the given order."""
        assert self._states is not None
        which = torch.tensor(kept, dtype=torch.int64)
        self._states = self._states.index_select(2, which.to(self._states.device))
        self._sees, self._depth = self._sees[which], self._depth[which]
        self.lengths = [self.lengths[i] for i in kept]
        self._narrow()

    def advance(self, parents: Tensor) -> "BeamLayout":
        """Give every beam a new token behind its parent; the forward pass that follows fills it in.

        parents (N, beams) int64: which of the prompt's beams each one continues.
        """
        sees = self._sees.gather(1, parents[:, :, None].expand(-1, -1, self.n_columns))
        used = sees.any(dim=1)
        self._sees = sees
        self._widen(int(used.sum(dim=1).max()) + self._n_beams)
        free = ~self._sees.any(dim=1)
        first = free.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        columns = first[:, : self._n_beams]
        lengths = torch.tensor(self.lengths)
        self._sees.scatter_(2, columns[:, :, None], True)
        self._depth.scatter_(1, columns, lengths[:, None].expand(-1, self._n_beams))
        assert self._states is not None
        self._columns = columns.to(self._states.device)
        self.lengths = [length + 1 for length in self.lengths]
        return BeamLayout(self._sees, lengths[:, None] - self._depth)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a block's key and value (N, H_kv, beams, h); return all columns (N, H_kv, C, h)."""
        assert self._states is not None
        keys, values = self._states[layer_idx]
        where = self._columns[:, None, :, None].expand(-1, *key_states.shape[1:])
        keys.scatter_(2, where, key_states)
        values.scatter_(2, where, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return the tokens of the longest beam before the forward pass that is under way."""
        return max(self.lengths, default=1) - 1

    def _narrow(self) -> None:
        """Drop columns that nobody sees, where they are more than half of all."""
        assert self._states is not None
        used = self._sees.any(dim=1)  # (N, C)
        n_columns = (int(used.sum(dim=1).max()) if len(used) else 0) + self._n_beams + MIN_ROOM
        if 2 * n_columns < self.n_columns:
            kept = used.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n_columns]
            where = kept.to(self._states.device)[None, None, :, None, :, None]
            shape = (*self._states.shape[:4], n_columns, self._states.shape[5])
            self._states = self._states.gather(4, where.expand(shape))
            self._sees = self._sees.gather(2, kept[:, None].expand(-1, self._n_beams, -1))
            self._depth = self._depth.gather(1, kept)

    def _widen(self, needed: int) -> None:
        """Make room for `needed` columns."""
        assert self._states is not None
        more = needed + MIN_ROOM - self.n_columns if needed > self.n_columns else 0
        if more > 0:
            self._states = torch.nn.functional.pad(self._states, (0, 0, 0, more))
            self._sees = torch.nn.functional.pad(self._sees, (0, more))
            self._depth = torch.nn.functional.pad(self._depth, (0, more))


class BeamLayout(Layout):
    """The beams of N prompts; sees (N, beams, C), distance (N, C) from the new tokens back."""

    def __init__(self, sees: Tensor, distance: Tensor) -> None:
        super().__init__()
        self._sees, self._distance = sees, distance

    def visible(self, window: int | None) -> Tensor:
        """Return (N, beams, C)."""
        if window is None:
            return self._sees
        return self._sees & (self._distance < window)[:, None]

    def expand(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """(N, beams, C) -> (N * H_kv, G * beams, C)."""
        n_groups = query.shape[1] // key.shape[1]
        return mask.repeat(1, n_groups, 1).repeat_interleave(key.shape[1], dim=0)

    def group(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (N * H_kv, G * beams, h) and twice (N * H_kv, C, h)."""
        n_products, head_dim = key.shape[0] * key.shape[1], key.shape[3]
        q = query.reshape(n_products, -1, head_dim)
        return q, key.reshape(n_products, -1, head_dim), value.reshape(n_products, -1, head_dim)

    def merge(self, out: Tensor, query: Tensor) -> Tensor:
        """(N * H_kv, G * beams, h) -> (N, beams, H, h)."""
        return out.view(query.shape).transpose(1, 2)
