"""Prefix trees laid out for attention: who sees whom, and nodes in chunks.

    query i may see key j   iff   j <= i < subtree_end[j]   (and depth_i - depth_j < window)

Nodes are cut into equal chunks of neighbours. What a chunk can see is itself and the ancestors of
its first node, because the layout is depth first, so a chunk needs Lq x (A + Lq) scores instead of
Lq x T. Long paths, whose nodes all see the same ancestors, can be had whole.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from swlora.data.prefix_tree import PrefixTree
from swlora.kernels.attention_interface import additive_mask
from swlora.kernels.host_arrays import on_device

CHUNK_NODES = (64, 128, 256, 512)
# In scores of one head: what a key costs that is fetched for a chunk, and a stretch of chunks that
# is computed on its own; and the most that a stretch has, where it can be halved.
GATHER_SCORES, PART_SCORES, MOST_SCORES = 16, 8192, 1 << 20
# A path is long with so many nodes, and in chunks it is cut into parts of as many: with fewer, the
# shapes of their products, three a part, are more than the kernels that oneDNN keeps, and making
# them anew took a tenth of a step.
PATH_NODES = 256
FEW_KEYS = 160  # seen by a node
MOST_STRETCHES = 8  # runs of neighbours that a chunk's keys are copied from, instead of gathered


@dataclass(frozen=True)
class NodeChunks:
    """Nodes `start` to `end` in S chunks of Lq neighbours; chunk s sees A ancestors and itself.

    key_nodes: (S, A + Lq) int64, the nodes that a chunk sees at most, its ancestors first; 0 where
    is_padding, (S, A + Lq) bool. `stretches` are these nodes as few runs of neighbours where there
    is one chunk, as on a path of a tree: they need not be gathered. The first `n_open` of the A
    ancestors are seen by every node of every chunk: no mask is needed there.
    """

    start: int
    end: int
    n_ancestors: int
    n_open: int
    key_nodes: Tensor
    is_padding: Tensor
    stretches: tuple[slice, ...]

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

    @property
    def n_scores(self) -> int:
        """Scores of one head, the padding included."""
        return self.key_nodes.numel() * self.chunk_nodes

    @property
    def has_few_scores(self) -> bool:
        """Say whether what is made of the scores may be kept: it is linear in the nodes."""
        return self.key_nodes.shape[1] <= FEW_KEYS

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


@dataclass(frozen=True)
class NodePath:
    """Nodes of which each is the child of the one before, and the ancestors of the first, (A,)."""

    nodes: slice
    ancestors: Tensor


class TreeLayout:
    """One prefix tree of T nodes on a device: what a decoder and its attention need to run it.

    token_ids, position_ids: (1, T) int64; subtree_end, depth: (T,) int64. sequence_tokens: lengths
    of the shortest and the longest sequence.
    """

    def __init__(self, tree: PrefixTree, device: torch.device) -> None:
        self.token_ids = on_device(tree.token_ids.astype(np.int64), device)[None]
        self.position_ids = on_device(tree.position_ids.astype(np.int64), device)[None]
        self.subtree_end = on_device(tree.subtree_end.astype(np.int64), device)
        self.depth = self.position_ids[0]
        self.sequence_tokens = tree.shortest_tokens, tree.longest_tokens
        self.tree = tree
        self._parts: dict[tuple[int | None, bool], list[NodeChunks]] = {}
        self._masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}

    @property
    def n_nodes(self) -> int:
        """Nodes of the tree, T."""
        return int(self.subtree_end.shape[0])

    @cached_property
    def _long_paths(self) -> list[tuple[int, int]]:
        """Where paths of PATH_NODES nodes and more begin and end."""
        begins = np.flatnonzero(np.diff(self.tree.position_ids, prepend=-2) != 1)
        ends = np.append(begins[1:], self.n_nodes)
        is_long = ends - begins >= PATH_NODES
        return list(zip(begins[is_long].tolist(), ends[is_long].tolist(), strict=True))

    @cached_property
    def _path_edges(self) -> NDArray[np.int64]:
        return np.unique(np.array(self._long_paths, dtype=np.int64))

    @cached_property
    def paths(self) -> list[NodePath]:
        """Paths of PATH_NODES nodes and more, in the order of the nodes."""
        return [
            NodePath(slice(start, end), on_device(_ancestors(self.tree, start), self.depth.device))
            for start, end in self._long_paths
        ]

    def parts(self, window: int | None, *, beside_paths: bool = False) -> list[NodeChunks]:
        """Return all nodes in stretches of chunks that need few scores, made once for all layers.

        Chunks of a stretch are padded to its longest list of ancestors, so a stretch is halved
        where that saves more scores than `PART_SCORES`, or where it has more than `MOST_SCORES`.
        `beside_paths`: without those of `paths`.
        """
        kind = window, beside_paths
        if kind not in self._parts:
            paths = self._long_paths if beside_paths else []
            starts = [0, *(end for _, end in paths)]
            ends = [*(start for start, _ in paths), self.n_nodes]
            self._parts[kind] = [
                part
                for start, end in zip(starts, ends, strict=True)
                if start < end
                for part in self._halved(self.cut(start, end, window=window), window)
            ]
        return self._parts[kind]

    def _halved(self, whole: NodeChunks, window: int | None) -> list[NodeChunks]:
        start, end, size = whole.start, whole.end, CHUNK_NODES[0]
        is_path = bool(whole.stretches) and whole.n_open == whole.n_ancestors > 0
        if end - start <= size or whole.n_scores <= PART_SCORES:
            return [whole]
        if is_path and end - start <= PATH_NODES and whole.n_scores <= MOST_SCORES:
            return [whole]
        middle = self._middle(start, end)
        halves = [
            part
            for edges in ((start, middle), (middle, end))
            for part in self._halved(self.cut(*edges, window=window), window)
        ]
        n_scores = sum(part.n_scores + PART_SCORES for part in halves)
        return halves if min(n_scores, MOST_SCORES) < whole.n_scores + PART_SCORES else [whole]

    def _middle(self, start: int, end: int) -> int:
        """Return where to halve: where a long path begins or ends, else after whole chunks."""
        size, middle = CHUNK_NODES[0], (start + end) // 2
        edges = self._path_edges[(self._path_edges > start) & (self._path_edges < end)]
        if len(edges):
            return int(edges[np.abs(edges - middle).argmin()])
        return start + size * ((end - start + size) // (2 * size))

    def cut(
        self, start: int, end: int, *, window: int | None = None, gather_cost: int = GATHER_SCORES
    ) -> NodeChunks:
        """Cut nodes `start` to `end` into the chunks that cost least.

        Fetching a key for a chunk costs as much as `gather_cost` scores. Ancestors that no node
        sees within the window are left out.
        """
        sizes = sorted({min(n, end - start) for n in CHUNK_NODES})
        options = [(size, _keys_of_chunks(self.tree, start, end, size, window)) for size in sizes]
        size, keys = min(options, key=lambda option: option[1].size * (option[0] + gather_cost))
        device = self.subtree_end.device
        return NodeChunks(
            start=start,
            end=end,
            n_ancestors=keys.shape[1] - size,
            n_open=_n_open(self.tree, keys, start, end, size) if window is None else 0,
            key_nodes=on_device(keys.clip(min=0), device),
            is_padding=on_device(keys < 0, device),
            stretches=_stretches(keys),
        )

    def visible(self, chunks: NodeChunks, window: int | None) -> Tensor:
        """Return which keys of its chunk a node sees, (S, Lq, A + Lq) bool."""
        n_queries = chunks.n_chunks * chunks.chunk_nodes
        queries = torch.arange(chunks.start, chunks.start + n_queries, device=self.depth.device)
        queries = queries.view(chunks.n_chunks, -1, 1).clamp(max=chunks.end - 1)
        keys = chunks.key_nodes[:, None, :]
        seen = sees(queries, keys, self.subtree_end, self.depth, window)
        return seen & ~chunks.is_padding[:, None, :]

    def mask(self, chunks: NodeChunks, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask (S, 1, Lq, A + Lq - n_open) of a part of `parts(window)`.

        It is that of the keys after the `n_open` that every node sees. Where it is small, linear in
        the nodes, it is kept for the other layers.
        """
        kind = chunks.start, chunks.end, window, dtype
        kept = self._masks.get(kind)
        if kept is not None:
            return kept
        visible = self.visible(chunks, window)[..., chunks.n_open :]
        mask = additive_mask(visible, dtype)[:, None]
        if mask.shape[-1] <= max(FEW_KEYS, PATH_NODES):
            self._masks[kind] = mask
        return mask


def sees(
    query: Tensor, key: Tensor, subtree_end: Tensor, depth: Tensor, window: int | None
) -> Tensor:
    """Say which query nodes may see which key nodes; the closed form above."""
    seen = (key <= query) & (query < subtree_end[key])
    return seen if window is None else seen & (depth[query] - depth[key] < window)


def _keys_of_chunks(
    tree: PrefixTree, start: int, end: int, chunk_nodes: int, window: int | None
) -> NDArray[np.int64]:
    """Return (S, A + Lq): the ancestors that a chunk sees, then its own nodes; -1 is padding."""
    starts = range(start, end, chunk_nodes)
    depth = tree.position_ids
    paths = []
    for first in starts:
        path = _ancestors(tree, first)
        if window is not None:
            shallowest = int(depth[first : min(first + chunk_nodes, end)].min())
            path = path[max(0, shallowest - window + 1) :]
        paths.append(path)
    n_ancestors = max(len(path) for path in paths)
    keys = np.full((len(starts), n_ancestors + chunk_nodes), -1, dtype=np.int64)
    for chunk, (first, path) in enumerate(zip(starts, paths, strict=True)):
        own = np.arange(first, min(first + chunk_nodes, end))
        keys[chunk, : len(path)] = path
        keys[chunk, n_ancestors : n_ancestors + len(own)] = own
    return keys


def _ancestors(tree: PrefixTree, node: int) -> NDArray[np.int64]:
    """Return the ancestors of a node by their depth, (A,)."""
    return np.flatnonzero(tree.subtree_end[:node] > node)


def _stretches(keys: NDArray[np.int64]) -> tuple[slice, ...]:
    """Return the only row of `keys` as runs of neighbours; none where these are many."""
    if len(keys) > 1 or keys[0, 0] < 0:
        return ()
    breaks = np.flatnonzero(np.diff(keys[0]) != 1) + 1
    if len(breaks) >= MOST_STRETCHES:
        return ()
    runs = np.split(keys[0], breaks)
    return tuple(slice(int(run[0]), int(run[-1]) + 1) for run in runs)


def _n_open(
    tree: PrefixTree, keys: NDArray[np.int64], start: int, end: int, chunk_nodes: int
) -> int:
    """Return how many ancestors, from the root on, all nodes of all chunks see.

    Ancestors are nested, so the ones that a whole chunk lies below come first.
    """
    ends = np.minimum(np.arange(start, end, chunk_nodes) + chunk_nodes, end)
    ancestors = keys[:, : keys.shape[1] - chunk_nodes]
    seen = (ancestors >= 0) & (tree.subtree_end[ancestors.clip(min=0)] >= ends[:, None])
    return int(seen.sum(axis=1).min())
