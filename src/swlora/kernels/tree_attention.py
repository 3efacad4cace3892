"""Attention over tree rows, for unmodified transformers decoders.

    query i may see key j   iff   j <= i < subtree_end[j]   (and depth_i - depth_j < window)

On a CPU the T queries are cut into equal runs of neighbours. What a run can see is itself and the
ancestors of its first node, because the layout is depth first, so a run needs Lq x (A + Lq) scores
instead of Lq x T. Forward and backward are plain matrix products with float32 softmax: at these
lengths several times faster than the fused CPU kernel with a mask. On CUDA the same closed form
is a flex_attention mask.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swlora.data.prefix_tree import PrefixTree
from swlora.errors import RunFailedError
from swlora.kernels.wide import wide
from swlora.threads import adapt_threads

NAME = "swlora_tree"
MASKED = -1e30  # finite, so that padded queries, which see nothing, stay finite too
_ACTIVE: ContextVar["TreeLayout"] = ContextVar("swlora_active_layout")


@dataclass(frozen=True)
class Runs:
    """The queries cut into S runs of Lq nodes; run s sees A ancestors (padded) and itself.

    ancestors (S, A) node numbers; visible(window) (S, Lq, A + Lq) additive float32 mask.
    """

    n_nodes: int
    run_nodes: int
    ancestors: Tensor
    key_nodes: Tensor
    depth: Tensor
    subtree_end: Tensor
    is_padding: Tensor

    @property
    def n_runs(self) -> int:
        """Number of runs, S."""
        return self.ancestors.shape[0]

    def mask(self, window: int | None) -> Tensor:
        """Return the additive mask (S, 1, Lq, A + Lq): 0 where visible, MASKED elsewhere."""
        queries = torch.arange(self.n_runs * self.run_nodes, device=self.depth.device)
        queries = queries.view(self.n_runs, self.run_nodes, 1).clamp(max=self.n_nodes - 1)
        keys = self.key_nodes[:, None, :]
        visible = (keys <= queries) & (queries < self.subtree_end[keys])
        visible &= ~self.is_padding[:, None, :]
        if window is not None:
            visible &= self.depth[queries] - self.depth[keys] < window
        return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, MASKED)[
            :, None
        ]


class TreeLayout:
    """One tree row on a device: what the decoder and its attention need to run it."""

    def __init__(self, row: PrefixTree, device: torch.device) -> None:
        self.token_ids = torch.from_numpy(row.token_ids.astype(np.int64)).to(device)[None]
        self.position_ids = torch.from_numpy(row.position_ids.astype(np.int64)).to(device)[None]
        self.subtree_end = torch.from_numpy(row.subtree_end.astype(np.int64)).to(device)
        self.sequence_tokens = row.shortest_tokens, row.longest_tokens
        self._row = row
        self.n_attentions = 0  # how often attention followed this layout
        self._masks: dict[int | None, Tensor] = {}

    @property
    def n_nodes(self) -> int:
        """Nodes of the row, T."""
        return int(self.subtree_end.shape[0])

    @cached_property
    def runs(self) -> Runs:
        """The cut into runs that needs the fewest scores."""
        options = [
            (run_nodes, _ancestors(self._row, run_nodes))
            for run_nodes in sorted({min(n, self.n_nodes) for n in (64, 128, 256, 512)})
        ]
        run_nodes, ancestors = min(options, key=lambda o: o[1].size * o[0] + _own_scores(o))
        device = self.subtree_end.device
        key_nodes, is_padding = _key_nodes(ancestors, run_nodes, self.n_nodes)
        return Runs(
            n_nodes=self.n_nodes,
            run_nodes=run_nodes,
            ancestors=torch.from_numpy(ancestors.clip(min=0)).to(device),
            key_nodes=torch.from_numpy(key_nodes).to(device),
            depth=self.position_ids[0],
            subtree_end=self.subtree_end,
            is_padding=torch.from_numpy(is_padding).to(device),
        )

    def run_mask(self, window: int | None) -> Tensor:
        """Return the mask of the runs, made once a window."""
        if window not in self._masks:
            self._masks[window] = self.runs.mask(window)
        return self._masks[window]

    @cached_property
    def _flex_masks(self) -> dict[int | None, Any]:
        return {}

    def flex_mask(self, window: int | None) -> Any:
        """Return the flex_attention block mask, made once a window."""
        if window not in self._flex_masks:
            self._flex_masks[window] = _make_flex_mask(self, window)
        return self._flex_masks[window]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the layout that attention follows while the body runs."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


@contextmanager
def tree_attention(config: Any) -> Iterator[None]:
    """Let a model with this config attend over tree rows while the body runs."""
    previous = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = previous


def tree_attention_forward(
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
    """Attend along the active layout; the attention function registered with transformers.

    query (1, H, T, h), key and value (1, H_kv, T, h) -> (1, T, H, h).
    """
    if attention_mask is not None or dropout or query.shape[0] != 1:
        raise RunFailedError("tree rows take no mask, no attention dropout and a batch of one")
    layout = _ACTIVE.get()
    layout.n_attentions += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    del module
    if query.is_cuda:
        return _flex(layout, query, key, value, scale, sliding_window, softcap), None
    mask = layout.run_mask(sliding_window)
    return _run_attention(query, key, value, mask, layout.runs, scale, softcap), None


ALL_ATTENTION_FUNCTIONS.register(NAME, tree_attention_forward)


class _RunAttention(torch.autograd.Function):
    """softmax(scale q k' + mask) v over runs; grouped heads share a key without copies."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        runs: Runs,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        n_groups = query.shape[1] // key.shape[1]
        q = _query_runs(query, runs, key.shape[1]) * scale  # (S * H_kv, G * Lq, h)
        k, v = _key_runs(key, runs), _key_runs(value, runs)  # (S * H_kv, A + Lq, h)
        scores = wide(torch.bmm(q, k.transpose(1, 2)))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        by_head = scores.view(runs.n_runs, -1, runs.run_nodes, scores.shape[-1])
        by_head += mask
        p = torch.softmax(scores, dim=-1).to(query.dtype)
        ctx.save_for_backward(q, k, v, p)
        ctx.runs, ctx.scale, ctx.softcap, ctx.n_groups = runs, scale, softcap, n_groups
        return _merge_query_runs(torch.bmm(p, v), runs, key.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        adapt_threads()
        q, k, v, p = ctx.saved_tensors
        runs: Runs = ctx.runs
        n_kv = k.shape[0] // runs.n_runs
        d_out = _query_runs(grads[0].transpose(1, 2), runs, n_kv)
        d_v = torch.bmm(p.transpose(1, 2), d_out)
        d_p = torch.bmm(d_out, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
        if ctx.softcap is not None:
            capped = wide(torch.bmm(q, k.transpose(1, 2))) / ctx.softcap
            d_scores = d_scores * (1 - torch.tanh(capped) ** 2).to(p.dtype)
        d_q = torch.bmm(d_scores, k).mul_(ctx.scale)
        d_k = torch.bmm(d_scores.transpose(1, 2), q)
        d_query = _merge_query_runs(d_q, runs, n_kv).transpose(1, 2)
        return (
            d_query,
            _merge_key_runs(d_k, runs),
            _merge_key_runs(d_v, runs),
            None,
            None,
            None,
            None,
        )


_run_attention: Callable[..., Tensor] = _RunAttention.apply


def _query_runs(x: Tensor, runs: Runs, n_kv: int) -> Tensor:
    """(1, H, T, h) -> (S * H_kv, G * Lq, h); the last run is padded with zeros."""
    n_heads, head_dim = x.shape[1], x.shape[3]
    x = x[0].transpose(0, 1)  # (T, H, h)
    x = F.pad(x, (0, 0, 0, 0, 0, runs.n_runs * runs.run_nodes - runs.n_nodes))
    x = x.view(runs.n_runs, runs.run_nodes, n_kv, n_heads // n_kv, head_dim)
    return x.permute(0, 2, 3, 1, 4).reshape(runs.n_runs * n_kv, -1, head_dim)


def _merge_query_runs(x: Tensor, runs: Runs, n_kv: int) -> Tensor:
    """(S * H_kv, G * Lq, h) -> (1, T, H, h)."""
    head_dim = x.shape[-1]
    x = x.view(runs.n_runs, n_kv, -1, runs.run_nodes, head_dim).permute(0, 3, 1, 2, 4)
    return x.reshape(1, runs.n_runs * runs.run_nodes, -1, head_dim)[:, : runs.n_nodes]


def _key_runs(x: Tensor, runs: Runs) -> Tensor:
    """(1, H_kv, T, h) -> (S * H_kv, A + Lq, h): every run's ancestors, then its own nodes."""
    n_kv, head_dim = x.shape[1], x.shape[3]
    x = x[0].transpose(0, 1)
    own = F.pad(x, (0, 0, 0, 0, 0, runs.n_runs * runs.run_nodes - runs.n_nodes))
    own = own.view(runs.n_runs, runs.run_nodes, n_kv, head_dim)
    both = torch.cat([x[runs.ancestors], own], dim=1)  # (S, A + Lq, H_kv, h)
    return both.transpose(1, 2).reshape(runs.n_runs * n_kv, -1, head_dim)


def _merge_key_runs(d: Tensor, runs: Runs) -> Tensor:
    """Transpose of `_key_runs`: (S * H_kv, A + Lq, h) -> (1, H_kv, T, h), ancestors summed."""
    head_dim = d.shape[-1]
    d = d.view(runs.n_runs, -1, d.shape[1], head_dim).transpose(1, 2)  # (S, A + Lq, H_kv, h)
    n_ancestors = runs.ancestors.shape[1]
    n_kv = d.shape[2]
    out = d[:, n_ancestors:].reshape(-1, n_kv, head_dim)[: runs.n_nodes].contiguous()
    if n_ancestors:
        shared = d[:, :n_ancestors].reshape(-1, n_kv, head_dim)
        out.index_add_(0, runs.ancestors.flatten(), shared)
    return out.transpose(0, 1)[None]


def _ancestors(row: PrefixTree, run_nodes: int) -> np.ndarray:
    """Return (S, A): what the first node of each run sees before the run; -1 is padding."""
    n_nodes = len(row.subtree_end)
    starts = np.arange(0, n_nodes, run_nodes)
    paths = [np.flatnonzero(row.subtree_end[:start] > start) for start in starts]
    out = np.full((len(starts), max(len(path) for path in paths)), -1, dtype=np.int64)
    for run, path in enumerate(paths):
        out[run, : len(path)] = path
    return out


def _own_scores(option: tuple[int, np.ndarray]) -> int:
    run_nodes, ancestors = option
    return run_nodes * run_nodes * len(ancestors)


def _key_nodes(
    ancestors: np.ndarray, run_nodes: int, n_nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    n_runs = len(ancestors)
    own = np.arange(n_runs * run_nodes).reshape(n_runs, run_nodes)
    own[own >= n_nodes] = -1
    key_nodes = np.concatenate([ancestors, own], axis=1)
    return key_nodes.clip(min=0), key_nodes < 0


def _make_flex_mask(layout: TreeLayout, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    end, depth = layout.subtree_end, layout.position_ids[0]

    def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < end[k])
        return seen & (depth[q] - depth[k] < window) if window is not None else seen

    n_nodes = layout.n_nodes
    return create_block_mask(visible, None, None, n_nodes, n_nodes, device=end.device)


def _flex(
    layout: TreeLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    def capped(score: Tensor, *_where: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    out = _compiled_flex()(
        query,
        key,
        value,
        score_mod=capped if softcap is not None else None,
        block_mask=layout.flex_mask(window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    transposed: Tensor = out.transpose(1, 2)
    return transposed


_FLEX: list[Any] = []


def _compiled_flex() -> Any:
    if not _FLEX:
        from torch.nn.attention.flex_attention import flex_attention

        _FLEX.append(torch.compile(flex_attention, dynamic=True))
    return _FLEX[0]
