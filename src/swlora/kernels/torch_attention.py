"""Attention along a prefix tree by torch's own kernels: flex_attention, or a mask of all pairs.

    flex    flex_attention, compiled once for all lengths; blocks of 128 x 128 scores of which no
            node sees any are not computed
    dense   scaled_dot_product_attention with a mask (T, T): nothing is compiled, but every score is
            computed; it has no soft cap

A length of its own would be compiled anew, so the nodes are padded to a multiple of 128, and sizes
are symbols of the compiled code. Numbers such as the scale are not: a kernel takes none as input.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from swlora.data.prefix_tree import PrefixTree
from swlora.kernels.attention_interface import Scoring, additive_mask
from swlora.kernels.host_arrays import on_device
from swlora.kernels.tree_layout import TreeLayout, sees

BLOCK = 128
LEAST_NODES = 4 * BLOCK  # fewer blocks would be taken for sizes that are always the same
# torch stops compiling for new sizes after 8 times, and computes all scores from there on unsaid.
MOST_COMPILED = 32

Bools = NDArray[np.bool_]


class CompiledTooOftenError(RuntimeError):
    """flex_attention was compiled MOST_COMPILED times; torch would not say that it gave up."""


@dataclass
class _Masks:
    """What is made of one layout for all its layers, by window."""

    blocks: dict[int | None, Any] = field(default_factory=dict)
    dense: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)


_MASKS: WeakKeyDictionary[TreeLayout, _Masks] = WeakKeyDictionary()


def flex(layout: TreeLayout, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Attend by flex_attention; (1, H, T, h), (1, H_kv, T, h) twice -> (1, T, H, h).

    Raises CompiledTooOftenError. On a CPU flex_attention has no gradient.
    """
    if n_compiled() >= MOST_COMPILED:
        raise CompiledTooOftenError(f"flex_attention was compiled {MOST_COMPILED} times")
    n_nodes = query.shape[2]
    blocks = block_mask(layout, scoring.window)
    padded = (_padded(x, blocks.seq_lengths[0]) for x in (query, key, value))
    softcap = scoring.softcap
    # What a hook would keep of compiled code is not ours to make again.
    with torch.autograd.graph.saved_tensors_hooks(_as_is, _as_is):
        out = _compiled_flex()(
            *padded,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=blocks,
            scale=scoring.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    transposed: Tensor = out[:, :, :n_nodes].transpose(1, 2)
    return transposed


def dense(
    layout: TreeLayout, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Attend by torch's scaled_dot_product_attention with a mask of all pairs; as `flex`.

    Raises ValueError for a soft cap.
    """
    if scoring.softcap is not None:
        raise ValueError("scaled_dot_product_attention has no soft cap")
    n_nodes, n_groups = query.shape[2], query.shape[1] // key.shape[1]
    mask = _dense_mask(layout, scoring.window, query.dtype)
    # Grouped heads with a mask would be computed by the slowest kernel: keys are repeated.
    if n_groups > 1:
        key, value = (x.repeat_interleave(n_groups, dim=1) for x in (key, value))
    query, key, value = (_padded(x, len(mask)) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scoring.scale)
    return out[:, :, :n_nodes].transpose(1, 2)


@dataclass(frozen=True)
class Blocks:
    """Which blocks of BLOCK x BLOCK scores some node sees (`partial`), and which are seen whole.

    (n, n) bool, queries first; no block is both.
    """

    partial: Bools
    full: Bools


def seen_blocks(tree: PrefixTree, window: int | None) -> Blocks:
    """Return the blocks of a padded tree's scores, from each block's extremes alone.

    What is left out is seen by nobody, and what is full by all of it; a partial block may have no
    score that is seen, where a window or another branch ends inside it.
    """
    end, depth = _padded_tree(tree)
    ends, depths = end.reshape(-1, BLOCK), depth.reshape(-1, BLOCK)
    first = np.arange(len(ends)) * BLOCK
    query, key = np.ix_(range(len(ends)), range(len(ends)))
    some = (key == query) | ((key < query) & (ends.max(1)[key] > first[query]))
    full = (key < query) & (ends.min(1)[key] >= first[query] + BLOCK)
    if window is not None:
        some &= depths.min(1)[query] - depths.max(1)[key] < window
        full &= depths.max(1)[query] - depths.min(1)[key] < window
    return Blocks(some & ~full, some & full)


@torch.inference_mode(False)  # an evaluation's masks serve the trial of kernels, with its gradients
def block_mask(layout: TreeLayout, window: int | None) -> Any:
    """Return flex_attention's mask of all nodes, padded; made once a window."""
    from torch.nn.attention.flex_attention import BlockMask

    masks = _MASKS.setdefault(layout, _Masks())
    if window in masks.blocks:
        return masks.blocks[window]
    device = layout.subtree_end.device
    end, depth = _padded_tree(layout.tree)
    # The compiled code takes tables by node, where a number would be one code for each window.
    lowest = np.zeros_like(depth) if window is None else depth - window + 1
    arrays = (on_device(x.astype(np.int32), device) for x in (end, depth, lowest))
    end_of, depth_of, lowest_of = arrays
    blocks = seen_blocks(layout.tree, window)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key, end_of, depth_of, None)

    def near(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = sees(query, key, end_of, depth_of, None)
        return seen & (depth_of[key] >= lowest_of[query])

    def tables(by_row: Bools, name: str) -> dict[str, Tensor]:
        counts, order = _table(by_row, device)
        return {f"{name}_num_blocks": counts, f"{name}_indices": order}

    make: Any = BlockMask
    mask = make(
        seq_lengths=(len(end), len(end)),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible if window is None else near,
        **tables(blocks.partial, "kv"),
        **tables(blocks.full, "full_kv"),
        **tables(blocks.partial.T, "q"),
        **tables(blocks.full.T, "full_q"),
    )
    masks.blocks[window] = mask
    return mask


def _table(by_row: Bools, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the number of blocks of every row, (1, 1, n), and which they are, first; int32."""
    order = np.argsort(~by_row, axis=1, kind="stable").astype(np.int32)
    counts = by_row.sum(1, dtype=np.int32)
    return on_device(counts, device)[None, None], on_device(order, device)[None, None]


@torch.inference_mode(False)
def _dense_mask(layout: TreeLayout, window: int | None, dtype: torch.dtype) -> Tensor:
    masks = _MASKS.setdefault(layout, _Masks())
    if (window, dtype) not in masks.dense:
        device = layout.subtree_end.device
        end, depth = (on_device(x, device) for x in _padded_tree(layout.tree))
        nodes = torch.arange(len(end), device=device)
        visible = sees(nodes[:, None], nodes[None, :], end, depth, window)
        masks.dense[window, dtype] = additive_mask(visible, dtype)
    return masks.dense[window, dtype]


def _padded_tree(tree: PrefixTree) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return subtree_end and depth with nodes behind them that see themselves alone."""
    n_nodes = len(tree.token_ids)
    n_padded = max(LEAST_NODES, -(-n_nodes // BLOCK) * BLOCK)
    end, depth = np.arange(1, n_padded + 1), np.zeros(n_padded, np.int64)
    end[:n_nodes], depth[:n_nodes] = tree.subtree_end, tree.position_ids
    return end, depth


def _padded(x: Tensor, n_nodes: int) -> Tensor:
    return F.pad(x, (0, 0, 0, n_nodes - x.shape[2]))


def _as_is(x: Any) -> Any:
    return x


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *_where: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _compiled_flex() -> Any:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    config.recompile_limit = max(config.recompile_limit, 2 * MOST_COMPILED)
    config.specialize_float = True  # else the scale is a tensor, which the kernels do not take
    return torch.compile(flex_attention, dynamic=True)


def n_compiled() -> int:
    """Return how often torch compiled something in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
