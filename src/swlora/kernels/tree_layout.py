"""Prefix trees laid out for attention: who sees whom, and nodes in chunks.

    query i may see key j   iff   j <= i < subtree_end[j]   (and depth_i - depth_j < window)

Nodes are cut into equal chunks of neighbours. What a chunk can see is itself and the ancestors of
its first node, because the layout is depth first, so a chunk needs Lq x (A + Lq) scores instead of
Lq x T.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from swlora.data.prefix_tree import PrefixTree
from swlora.kernels.attention_interface import additive_mask

CHUNK_NODES = (64, 128, 256, 512)


@dataclass(frozen=True)
class NodeChunks:
    """Nodes `start` to `end` in S chunks of Lq neighbours; chunk s sees A ancestors and itself.

    key_nodes: (S, A + Lq) int64, the nodes that a chunk sees at most, its ancestors first; 0 where
    is_padding, (S, A + Lq) bool.
    """

    start: int
    end: int
    n_ancestors: int
    key_nodes: Tensor
    is_padding: Tensor

    @property
    def n_chunks(self) -> int:
        """Number of chunks, S."""
        return self.key_nodes.shape[0]

    @property
    def chunk_nodes(self) -> int:
        """Nodes of a chunk, Lq."""
        return self.key_nodes.shape[1] - self.n_ancestors

    @property
    def n_nodes(self) -> int:
        """Nodes of all chunks without the padding, T."""
        return self.end - self.start

    @property
    def ancestors(self) -> Tensor:
        """The ancestors of every chunk, (S, A)."""
        return self.key_nodes[:, : self.n_ancestors]

    def by_node(self, x: Tensor) -> Tensor:
        """Cut x (T, heads, h) into chunks (S, Lq, heads, h); the last is padded with zeros."""
        n_padded = self.n_chunks * self.chunk_nodes - self.n_nodes
        return F.pad(x, (0, 0, 0, 0, 0, n_padded)).view(self.n_chunks, -1, *x.shape[1:])

    def split_queries(self, x: Tensor, n_kv: int) -> Tensor:
        """(1, H, T, h) -> (H_kv * S, G * Lq, h), the queries that share a key's head together."""
        _, n_heads, _, head_dim = x.shape
        chunks = self.by_node(x[0].transpose(0, 1))
        chunks = chunks.view(self.n_chunks, -1, n_kv, n_heads // n_kv, head_dim)
        return chunks.permute(2, 0, 3, 1, 4).reshape(n_kv * self.n_chunks, -1, head_dim)

    def merge_queries(self, x: Tensor) -> Tensor:
        """(H_kv * S, G * Lq, h) -> (1, T, H, h), without the padding."""
        n_groups, head_dim = x.shape[1] // self.chunk_nodes, x.shape[2]
        x = x.view(-1, self.n_chunks, n_groups, self.chunk_nodes, head_dim)
        x = x.permute(1, 3, 0, 2, 4)
        return x.reshape(1, self.n_chunks * self.chunk_nodes, -1, head_dim)[:, : self.n_nodes]


class TreeLayout:
    """One prefix tree of T nodes on a device: what a decoder and its attention need to run it.

    token_ids, position_ids: (1, T) int64; subtree_end, depth: (T,) int64. sequence_tokens: lengths
    of the shortest and the longest sequence.
    """

    def __init__(self, tree: PrefixTree, device: torch.device) -> None:
        self.token_ids = torch.from_numpy(tree.token_ids.astype(np.int64)).to(device)[None]
        self.position_ids = torch.from_numpy(tree.position_ids.astype(np.int64)).to(device)[None]
        self.subtree_end = torch.from_numpy(tree.subtree_end.astype(np.int64)).to(device)
        self.depth = self.position_ids[0]
        self.sequence_tokens = tree.shortest_tokens, tree.longest_tokens
        self._tree = tree
        self._masks: dict[int | None, Tensor] = {}
        self._flex_masks: dict[int | None, Any] = {}

    @property
    def n_nodes(self) -> int:
        """Nodes of the tree, T."""
        return int(self.subtree_end.shape[0])

    @cached_property
    def chunks(self) -> NodeChunks:
        """All nodes, in the chunks that need the fewest scores."""
        return self.cut(0, self.n_nodes)

    def cut(self, start: int, end: int, *, gather_cost: int = 0) -> NodeChunks:
        """Cut nodes `start` to `end` into the chunks that cost least.

        Fetching a key for a chunk costs as much as `gather_cost` scores.
        """
        sizes = sorted({min(n, end - start) for n in CHUNK_NODES})
        options = [(size, _keys_of_chunks(self._tree, start, end, size)) for size in sizes]
        size, keys = min(options, key=lambda option: option[1].size * (option[0] + gather_cost))
        device = self.subtree_end.device
        return NodeChunks(
            start=start,
            end=end,
            n_ancestors=keys.shape[1] - size,
            key_nodes=torch.from_numpy(keys.clip(min=0)).to(device),
            is_padding=torch.from_numpy(keys < 0).to(device),
        )

    def visible(self, chunks: NodeChunks, window: int | None) -> Tensor:
        """Return which keys of its chunk a node sees, (S, Lq, A + Lq) bool."""
        n_queries = chunks.n_chunks * chunks.chunk_nodes
        queries = torch.arange(chunks.start, chunks.start + n_queries, device=self.depth.device)
        queries = queries.view(chunks.n_chunks, -1, 1).clamp(max=chunks.end - 1)
        keys = chunks.key_nodes[:, None, :]
        seen = _sees(queries, keys, self.subtree_end, self.depth, window)
        return seen & ~chunks.is_padding[:, None, :]

    def mask(self, window: int | None) -> Tensor:
        """Return the additive float32 mask of `chunks`, (S, 1, Lq, A + Lq), made once a window."""
        if window not in self._masks:
            visible = self.visible(self.chunks, window)
            self._masks[window] = additive_mask(visible, torch.float32)[:, None]
        return self._masks[window]

    def flex_mask(self, window: int | None) -> Any:
        """Return the block mask of flex_attention for all nodes, made once a window."""
        if window not in self._flex_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            end, depth = self.subtree_end, self.depth

            def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return _sees(query, key, end, depth, window)

            self._flex_masks[window] = create_block_mask(
                sees, None, None, self.n_nodes, self.n_nodes, device=end.device
            )
        return self._flex_masks[window]


def _sees(
    query: Tensor, key: Tensor, subtree_end: Tensor, depth: Tensor, window: int | None
) -> Tensor:
    """Say which query nodes may see which key nodes; the closed form above."""
    seen = (key <= query) & (query < subtree_end[key])
    return seen if window is None else seen & (depth[query] - depth[key] < window)


def _keys_of_chunks(tree: PrefixTree, start: int, end: int, chunk_nodes: int) -> NDArray[np.int64]:
    """Return (S, A + Lq): the ancestors of each chunk's first node, then its own; -1 is padding."""
    starts = range(start, end, chunk_nodes)
    paths = [np.flatnonzero(tree.subtree_end[:first] > first) for first in starts]
    n_ancestors = max(len(path) for path in paths)
    keys = np.full((len(starts), n_ancestors + chunk_nodes), -1, dtype=np.int64)
    for chunk, (first, path) in enumerate(zip(starts, paths, strict=True)):
        own = np.arange(first, min(first + chunk_nodes, end))
        keys[chunk, : len(path)] = path
        keys[chunk, n_ancestors : n_ancestors + len(own)] = own
    return keys
