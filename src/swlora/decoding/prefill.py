"""Prompts run together as one prefix tree: a prefix that several share is computed once.

The tree of `swlora.data.prefix_tree` is run in stretches of its depth-first order, so that others
may have a turn in between. A stretch is cut into chunks (`swlora.kernels.tree_layout`), which see
the ancestors of their first nodes, wherever these lie, and themselves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.decoding.attention import Layout
from swlora.decoding.prompt_scores import PromptScores
from swlora.decoding.sampling import Choice
from swlora.kernels.rotary import RotaryLengths
from swlora.kernels.tree_layout import TreeLayout

PREFILL_TOKENS = 512  # run at once, if nothing else is asked for
GATHER_COST = 16  # fetching a key costs about as much as so many scores
MAX_SCORES = 1 << 25  # of one block; longer prompts are run in shorter stretches


class TreePrefill:
    """Keys, values and first logits of some prompts, a stretch at a time.

    All `n_layers` blocks of `base_model` must have an attention interface. The prompts must lie on
    one side of every limit of `rotary`. The tokens of those in `scored` get probabilities too, with
    so many alternatives named.
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
        self._tree = build_tree(TokenSequences.from_lists(pairs), np.arange(len(prompts)))
        self._layout = TreeLayout(self._tree, base_model.device)
        self._leaves = dict(
            zip(self._tree.target_id.tolist(), self._tree.target_position.tolist(), strict=True)
        )
        wanted = scored or {}
        self._scores = PromptScores(prompts, {i: self._path(i) for i in wanted}, wanted)
        self._cache = _NodeCache(n_layers, len(self._tree.token_ids))
        self._n_heads = int(base_model.config.num_attention_heads)
        self._rotary, self._longest_tokens = rotary, max(map(len, prompts))

    def advance(self, max_nodes: int) -> tuple[list[int], Tensor]:
        """Run up to `max_nodes` nodes more.

        Returns (the prompts that are complete with them, the logits after each (n, V)).
        """
        start = self._cache.end
        end = min(start + self._stretch(start, max_nodes), len(self._tree.token_ids))
        complete = [i for i, leaf in self._leaves.items() if start <= leaf < end]
        kept = {self._leaves[i] for i in complete} | self._scores.nodes(start, end)
        kept = kept or {start}  # a head of no rows is none
        places = {node: i for i, node in enumerate(sorted(kept))}
        self._cache.start, self._cache.end = start, end
        stretch = StretchLayout(self._layout, start, end)
        turned = self._rotary.turning(self._longest_tokens)
        with stretch.followed_by(self._model, self._n_layers), turned:
            out = self._model(
                input_ids=self._layout.token_ids[:, start:end],
                position_ids=self._layout.position_ids[:, start:end],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=torch.tensor(
                    [node - start for node in places], device=self._model.device
                ),
            )
        logits = out.logits[0]
        self._scores.take(start, end, places, logits)
        return complete, logits[[places[self._leaves[i]] for i in complete]]

    def scores(self, i: int) -> tuple[Choice, ...]:
        """Return the tokens of a complete prompt with their probabilities, if they were wanted."""
        return self._scores.scores(i)

    def states(self, i: int) -> Tensor:
        """Return keys and values of a complete prompt, (layers, 2, H_kv, length, h)."""
        assert self._cache.states is not None
        path = torch.from_numpy(self._path(i)).to(self._model.device)
        return self._cache.states.index_select(3, path)

    def _path(self, i: int) -> NDArray[np.int64]:
        """Return the nodes of a prompt, its first token's first."""
        leaf = self._leaves[i]
        return np.flatnonzero(self._tree.subtree_end[: leaf + 1] > leaf)

    def _stretch(self, start: int, max_nodes: int) -> int:
        deepest = int(self._tree.position_ids[start : start + max_nodes].max()) + 1
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
    """Nodes `start` to `end` of a tree, in S chunks of Lq nodes; a chunk sees K keys at most."""

    def __init__(self, layout: TreeLayout, start: int, end: int) -> None:
        super().__init__()
        self._layout = layout
        self._chunks = layout.cut(start, end, gather_cost=GATHER_COST)
        self._keys = self._chunks.key_nodes.flatten()

    def visible(self, window: int | None) -> Tensor:
        """Return (S, Lq, K)."""
        return self._layout.visible(self._chunks, window)

    def expand(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """(S, Lq, K) -> (H_kv * S, G * Lq, K)."""
        return mask.repeat(key.shape[1], query.shape[1] // key.shape[1], 1)

    def group(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (H_kv * S, G * Lq, h) and twice (H_kv * S, K, h)."""
        _, n_kv, _, head_dim = key.shape
        n_products = n_kv * self._chunks.n_chunks
        k, v = (x[0].index_select(1, self._keys) for x in (key, value))  # (H_kv, S * K, h)
        return (
            self._chunks.split_queries(query, n_kv),
            k.view(n_products, -1, head_dim),
            v.view(n_products, -1, head_dim),
        )

    def merge(self, out: Tensor, query: Tensor) -> Tensor:  # noqa: ARG002
        """(H_kv * S, G * Lq, h) -> (1, T, H, h)."""
        return self._chunks.merge_queries(out)
