"""Attention of all nodes of a prefix tree, forward and backward.

On a CPU it is plain matrix products over the chunks of `TreeLayout` with a float32 softmax: at
these lengths several times faster than the fused CPU kernel with a mask. On CUDA the closed form of
who sees whom is a flex_attention mask.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from swlora.errors import RunFailedError
from swlora.kernels.attention_interface import Scoring
from swlora.kernels.tree_layout import NodeChunks, TreeLayout
from swlora.kernels.wide import wide
from swlora.threads import adapt_threads


def tree_attention(
    layout: TreeLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
) -> Tensor:
    """Attend along the tree of `layout`; an `Attention` for `attending`.

    query (1, H, T, h), key and value (1, H_kv, T, h) -> (1, T, H, h). RunFailedError for a batch.
    """
    if query.shape[0] != 1:
        raise RunFailedError("a prefix tree takes a batch of one")
    if query.is_cuda:
        return _flex(layout, query, key, value, scoring)
    mask = layout.mask(scoring.window)
    return _chunk_attention(query, key, value, mask, layout.chunks, scoring)


class _ChunkAttention(torch.autograd.Function):
    """softmax(scale q k' + mask) v by chunks; grouped heads share a key without copies."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        chunks: NodeChunks,
        scoring: Scoring,
    ) -> Tensor:
        n_kv, softcap = key.shape[1], scoring.softcap
        q = chunks.split_queries(query, n_kv) * scoring.scale  # (H_kv * S, G * Lq, h)
        k, v = _split_keys(key, chunks), _split_keys(value, chunks)  # (H_kv * S, A + Lq, h)
        scores = wide(torch.bmm(q, k.transpose(1, 2)))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        by_head = scores.view(n_kv, chunks.n_chunks, -1, chunks.chunk_nodes, scores.shape[-1])
        by_head += mask
        p = torch.softmax(scores, dim=-1).to(query.dtype)
        ctx.save_for_backward(q, k, v, p)
        ctx.chunks, ctx.scoring = chunks, scoring
        return chunks.merge_queries(torch.bmm(p, v))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        adapt_threads()
        q, k, v, p = ctx.saved_tensors
        chunks: NodeChunks = ctx.chunks
        scoring: Scoring = ctx.scoring
        d_out = chunks.split_queries(grads[0].transpose(1, 2), k.shape[0] // chunks.n_chunks)
        d_v = torch.bmm(p.transpose(1, 2), d_out)
        d_p = torch.bmm(d_out, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
        if scoring.softcap is not None:
            capped = wide(torch.bmm(q, k.transpose(1, 2))) / scoring.softcap
            d_scores = d_scores * (1 - torch.tanh(capped) ** 2).to(p.dtype)
        d_q = torch.bmm(d_scores, k).mul_(scoring.scale)
        d_k = torch.bmm(d_scores.transpose(1, 2), q)
        d_query = chunks.merge_queries(d_q).transpose(1, 2)
        d_key, d_value = _merge_keys(d_k, chunks), _merge_keys(d_v, chunks)
        return d_query, d_key, d_value, None, None, None


_chunk_attention: Callable[..., Tensor] = _ChunkAttention.apply


def _split_keys(x: Tensor, chunks: NodeChunks) -> Tensor:
    """(1, H_kv, T, h) -> (H_kv * S, A + Lq, h): every chunk's ancestors, then its own nodes."""
    x = x[0].transpose(0, 1)
    both = torch.cat([x[chunks.ancestors], chunks.by_node(x)], dim=1)  # (S, A + Lq, H_kv, h)
    return both.permute(2, 0, 1, 3).reshape(-1, *chunks.key_nodes.shape[1:], x.shape[2])


def _merge_keys(d: Tensor, chunks: NodeChunks) -> Tensor:
    """Transpose of `_split_keys`: (H_kv * S, A + Lq, h) -> (1, H_kv, T, h), ancestors summed."""
    head_dim = d.shape[-1]
    d = d.view(-1, *chunks.key_nodes.shape, head_dim).permute(1, 2, 0, 3)  # (S, A + Lq, H_kv, h)
    n_kv, n_ancestors = d.shape[2], chunks.n_ancestors
    out = d[:, n_ancestors:].reshape(-1, n_kv, head_dim)[: chunks.n_nodes].contiguous()
    if n_ancestors:
        shared = d[:, :n_ancestors].reshape(-1, n_kv, head_dim)
        out.index_add_(0, chunks.ancestors.flatten(), shared)
    return out.transpose(0, 1)[None]


def _flex(
    layout: TreeLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
) -> Tensor:
    softcap = scoring.softcap

    def capped(score: Tensor, *_where: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    out = _compiled_flex()(
        query,
        key,
        value,
        score_mod=capped if softcap is not None else None,
        block_mask=layout.flex_mask(scoring.window),
        scale=scoring.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    transposed: Tensor = out.transpose(1, 2)
    return transposed


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
