"""Prompts run together as one prefix tree: a prefix that several share is computed once.

The tree of `swlora.data.prefix_tree` is run in stretches of its depth-first order, so that others
may have a turn in between. A stretch is cut into runs of neighbours; a run sees the ancestors of
its first node, wherever they lie, and itself:

    query i may see key j   iff   j <= i < subtree_end[j]   (and depth_i - depth_j < window)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.decoding.attention import Layout, attending
from swlora.decoding.prompt_scores import PromptScores
from swlora.decoding.sampling import Choice
from swlora.kernels.rotary import RotaryLengths

PREFILL_TOKENS = 512  # run at once, if nothing else is asked for
RUN_NODES = (64, 128, 256, 512)
GATHER_COST = 16  # fetching a key costs about as much as so many scores
MAX_SCORES = 1 << 25  # of one block; longer prompts are run in shorter stretches


class TreePrefill:
    """Keys, values and first logits of some prompts, a stretch at a time.

    `n_layers` blocks of `base_model` attend through the interface of `decode_attention`. The
    prompts must lie on one side of every limit of `rotary`. The tokens of those in `scored` get
    probabilities too, with so many alternatives named.
    """

    def __init__(
        self,
        base_model: Any,
        prompts: Sequence[Sequence[int]],
        n_layers: int,
        rotary: RotaryLengths,
        scored: Mapping[int, int] | None = None,
    ) -> None:
        self._model, self._n_layers = base_model, n_layers
        # A completion that numbers its prompt, so that the target says whose node it is.
        pairs = [(list(prompt), [i]) for i, prompt in enumerate(prompts)]
        self._row = build_tree(TokenSequences.from_lists(pairs), np.arange(len(prompts)))
        self._leaves = dict(
            zip(self._row.target_id.tolist(), self._row.target_position.tolist(), strict=True)
        )
        wanted = scored or {}
        self._scores = PromptScores(prompts, {i: self._path(i) for i in wanted}, wanted)
        self._cache = _NodeCache(n_layers, len(self._row.token_ids))
        self._n_heads = int(base_model.config.num_attention_heads)
        self._rotary, self._longest_tokens = rotary, max(map(len, prompts))

    def advance(self, max_nodes: int) -> tuple[list[int], Tensor]:
        """Run up to `max_nodes` nodes more.

        Returns (the prompts that are complete with them, the logits after each (n, V)).
        """
        start = self._cache.end
        end = min(start + self._stretch(start, max_nodes), len(self._row.token_ids))
        complete = [i for i, leaf in self._leaves.items() if start <= leaf < end]
        device = self._model.device
        kept = {self._leaves[i] for i in complete} | self._scores.nodes(start, end)
        kept = kept or {start}  # a head of no rows is none
        places = {node: row for row, node in enumerate(sorted(kept))}
        tokens, positions = (
            torch.from_numpy(nodes[None, start:end].astype(np.int64)).to(device)
            for nodes in (self._row.token_ids, self._row.position_ids)
        )
        self._cache.start, self._cache.end = start, end
        layout = StretchLayout(self._row, start, end, device)
        turned = self._rotary.of(self._longest_tokens)
        with attending(self._model.config, layout, self._n_layers), turned:
            out = self._model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=torch.tensor([node - start for node in places], device=device),
            )
        logits = out.logits[0]
        self._scores.take(start, end, places, logits)
        return complete, logits[[places[self._leaves[i]] for i in complete]]

    def scores(self, i: int) -> tuple[Choice, ...]:
        """Return the tokens of a complete prompt with their probabilities, if they were wanted."""
        return self._scores.of(i)

    def states(self, i: int) -> Tensor:
        """Return keys and values of a complete prompt, (layers, 2, H_kv, length, h)."""
        assert self._cache.states is not None
        path = torch.from_numpy(self._path(i)).to(self._model.device)
        return self._cache.states.index_select(3, path)

    def _path(self, i: int) -> NDArray[np.int64]:
        """Return the nodes of a prompt, its first token's first."""
        leaf = self._leaves[i]
        return np.flatnonzero(self._row.subtree_end[: leaf + 1] > leaf)

    def _stretch(self, start: int, max_nodes: int) -> int:
        deepest = int(self._row.position_ids[start : start + max_nodes].max()) + 1
        return max(1, min(max_nodes, MAX_SCORES // (self._n_heads * (deepest + max_nodes))))


class _NodeCache(Cache):  # type: ignore[misc]
    """Keys and values of every node of a tree, (layers, 2, H_kv, N, h)."""

    def __init__(self, n_layers: int, n_nodes: int) -> None:
        super().__init__(layers=[])
        self.states: Tensor | None = None
        self.start = self.end = 0  # the stretch under way; what lies before it is computed
        self._n_layers, self._n_nodes = n_layers, n_nodes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the stretch's key and value (1, H_kv, T, h); return all nodes, (1, H_kv, N, h)."""
        if self.states is None:
            _, n_heads, _, head_dim = key_states.shape
            self.states = key_states.new_zeros(self._n_layers, 2, n_heads, self._n_nodes, head_dim)
        keys, values = self.states[layer_idx]
        keys[:, self.start : self.end] = key_states[0]
        values[:, self.start : self.end] = value_states[0]
        return keys[None], values[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return the nodes before the stretch under way."""
        return self.start


class StretchLayout(Layout):
    """Nodes `start` to `end` of a tree, in S runs of Lq nodes; run s sees K keys at most."""

    def __init__(self, row: PrefixTree, start: int, end: int, device: torch.device) -> None:
        super().__init__()
        options = [
            _keys_of_runs(row, start, end, min(run_nodes, end - start)) for run_nodes in RUN_NODES
        ]
        # S * K keys are fetched for S * Lq * K scores.
        keys, run_nodes = min(options, key=lambda o: o[0].size * (o[1] + GATHER_COST))
        self._n_nodes, self._run_nodes, self._n_runs = end - start, run_nodes, len(keys)
        queries = np.arange(start, start + keys.shape[0] * run_nodes).reshape(-1, run_nodes, 1)
        queries = queries.clip(max=end - 1)
        sees, depth = keys[:, None, :], row.position_ids
        seen = (sees >= 0) & (sees <= queries) & (queries < row.subtree_end[sees])
        self._visible = torch.from_numpy(seen).to(device)
        self._distance = torch.from_numpy(depth[queries] - depth[sees]).to(device)
        self._keys = torch.from_numpy(keys.clip(min=0).ravel()).to(device)

    def visible(self, window: int | None) -> Tensor:
        """Return (S, Lq, K)."""
        return self._visible if window is None else self._visible & (self._distance < window)

    def expanded(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """(S, Lq, K) -> (H_kv * S, G * Lq, K)."""
        return mask.repeat(key.shape[1], query.shape[1] // key.shape[1], 1)

    def grouped(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (H_kv * S, G * Lq, h) and twice (H_kv * S, K, h)."""
        n_kv, head_dim = key.shape[1], key.shape[3]
        padding = self._n_runs * self._run_nodes - self._n_nodes
        q = torch.nn.functional.pad(query[0], (0, 0, 0, padding))  # (H, S * Lq, h)
        q = q.view(n_kv, -1, self._n_runs, self._run_nodes, head_dim).transpose(1, 2)
        k, v = (x[0].index_select(1, self._keys) for x in (key, value))  # (H_kv, S * K, h)
        n_products = n_kv * self._n_runs
        return (
            q.reshape(n_products, -1, head_dim),
            k.view(n_products, -1, head_dim),
            v.view(n_products, -1, head_dim),
        )

    def merged(self, out: Tensor, query: Tensor) -> Tensor:
        """(H_kv * S, G * Lq, h) -> (1, T, H, h)."""
        n_heads, head_dim = query.shape[1], query.shape[3]
        n_groups = out.shape[1] // self._run_nodes
        out = out.view(-1, self._n_runs, n_groups, self._run_nodes, head_dim)
        out = out.permute(1, 3, 0, 2, 4).reshape(1, -1, n_heads, head_dim)
        return out[:, : self._n_nodes]


def _keys_of_runs(
    row: PrefixTree, start: int, end: int, run_nodes: int
) -> tuple[NDArray[np.int64], int]:
    """Return ((S, K) what each run sees at most, -1 for padding; nodes a run)."""
    starts = range(start, end, run_nodes)
    paths = [np.flatnonzero(row.subtree_end[:first] > first) for first in starts]
    n_ancestors = max(len(path) for path in paths)
    keys = np.full((len(starts), n_ancestors + run_nodes), -1, dtype=np.int64)
    for run, (first, path) in enumerate(zip(starts, paths, strict=True)):
        own = np.arange(first, min(first + run_nodes, end))
        keys[run, : len(path)] = path
        keys[run, n_ancestors : n_ancestors + len(own)] = own
    return keys, run_nodes
