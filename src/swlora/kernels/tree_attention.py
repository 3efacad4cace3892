"""Attention of all nodes of a prefix tree, forward and backward.

On a CPU it is plain matrix products over the chunks of `TreeLayout` with a softmax that computes in
float32: at these lengths several times faster than the fused CPU kernel with a mask. In float32
long paths, which need no mask, are left to that kernel. On CUDA it is one of the ways of
`cuda_attention`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swlora.errors import RunFailedError
from swlora.kernels.attention_interface import Scoring
from swlora.kernels.cuda_attention import attend
from swlora.kernels.first_order import first_order
from swlora.kernels.path_attention import PathAttention, is_fused
from swlora.kernels.tree_layout import NodeChunks, TreeLayout
from swlora.kernels.wide import wide, wide_dtype
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
        return attend(layout, query, key, value, scoring, last=chunk_attention)
    return chunk_attention(layout, query, key, value, scoring)


def chunk_attention(
    layout: TreeLayout, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Attend as `tree_attention`, on any device."""
    if scoring.window is not None and scoring.window >= layout.sequence_tokens[1]:
        scoring = replace(scoring, window=None)  # which reaches further back than any sequence
    return _chunk_attention(query, key, value, layout, scoring)


class _ChunkAttention(torch.autograd.Function):
    """softmax(scale q k' + mask) v by paths and parts of chunks; heads share a key without copies.

    The probabilities of parts with few scores are kept, others are made again in backward, so that
    what is kept is linear in T.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scoring: Scoring
    ) -> Tensor:
        _, n_heads, n_nodes, head_dim = query.shape
        out = query.new_empty(1, n_nodes, n_heads, head_dim)
        has_paths = is_fused(query, key, value, scoring)
        ctx.paths = layout.paths if has_paths else []
        ctx.parts = layout.parts(scoring.window, beside_paths=has_paths)
        log_sums, kept = [], []
        for path in ctx.paths:
            attention = PathAttention(path, query, key, value, scoring.scale)
            out[:, path.nodes], log_sums_of_path = attention.outcome()
            log_sums.append(log_sums_of_path)
        for chunks in ctx.parts:
            part = _Part(layout, chunks, scoring, query, key, value)
            p = part.probabilities()
            out[:, chunks.start : chunks.end] = chunks.merge_queries(torch.bmm(p, part.v))
            kept.append(p if chunks.has_few_scores else None)
        ctx.save_for_backward(query, key, value, out if ctx.paths else None, *log_sums, *kept)
        ctx.layout, ctx.scoring = layout, scoring
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        adapt_threads()
        query, key, value, out, *of_parts = ctx.saved_tensors
        log_sums, kept = of_parts[: len(ctx.paths)], of_parts[len(ctx.paths) :]
        scoring: Scoring = ctx.scoring
        d_out = grads[0].transpose(1, 2)
        d_query = torch.empty_like(query)
        d_key, d_value = _zeros_by_node(key), _zeros_by_node(value)
        for path, log_sums_of_path in zip(ctx.paths, log_sums, strict=True):
            attention = PathAttention(path, query, key, value, scoring.scale)
            d_query[:, :, path.nodes], of_seen = attention.gradients(
                d_out[:, :, path.nodes], out[:, path.nodes].transpose(1, 2), log_sums_of_path
            )
            for nodes, d_k, d_v in of_seen:
                d_key[nodes] += d_k.transpose(0, 1)
                d_value[nodes] += d_v.transpose(0, 1)
        for chunks, p in zip(ctx.parts, kept, strict=True):
            part = _Part(ctx.layout, chunks, scoring, query, key, value)
            p = part.probabilities() if p is None else p
            nodes = slice(chunks.start, chunks.end)
            d_o = chunks.split_queries(d_out[:, :, nodes], key.shape[1])
            _add_keys(d_value, torch.bmm(p.transpose(1, 2), d_o), chunks)
            d_p = torch.bmm(d_o, part.v.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            if scoring.softcap is not None:
                d_scores = d_scores * part.slope(scoring.softcap)
            d_q = torch.bmm(d_scores, part.k).mul_(scoring.scale)
            d_query[:, :, nodes] = chunks.merge_queries(d_q).transpose(1, 2)
            _add_keys(d_key, torch.bmm(d_scores.transpose(1, 2), part.q), chunks)
        d_key, d_value = (d.transpose(0, 1)[None].to(key.dtype) for d in (d_key, d_value))
        return d_query, d_key, d_value, None, None


_chunk_attention: Callable[..., Tensor] = _ChunkAttention.apply


class _Part:
    """S chunks of Lq nodes: q (H_kv * S, G * Lq, h), k and v (H_kv * S, A + Lq, h)."""

    def __init__(
        self,
        layout: TreeLayout,
        chunks: NodeChunks,
        scoring: Scoring,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        self._layout, self._chunks, self._scoring = layout, chunks, scoring
        self._n_kv = key.shape[1]
        own = query[:, :, chunks.start : chunks.end]
        self.q = chunks.split_queries(own, key.shape[1]) * scoring.scale
        self.k, self.v = _keys(key, chunks), _keys(value, chunks)

    def probabilities(self) -> Tensor:
        """Return the softmax of all scores, (H_kv * S, G * Lq, A + Lq)."""
        softcap = self._scoring.softcap
        scores = self._scores()
        if softcap is not None:
            scores = softcap * torch.tanh(wide(scores) / softcap)
        elif scores.dtype != torch.bfloat16:  # whose softmax is float32 inside, and holds MASKED
            scores = wide(scores)
        chunks = self._chunks
        mask = self._layout.mask(chunks, self._scoring.window, scores.dtype)
        by_chunk = scores.view(
            self._n_kv, chunks.n_chunks, -1, chunks.chunk_nodes, scores.shape[-1]
        )
        by_chunk[..., chunks.n_open :].add_(mask)
        return torch.softmax(scores, dim=-1).to(self.q.dtype)

    def slope(self, softcap: float) -> Tensor:
        """Return the derivative of the soft cap at every score."""
        capped = torch.tanh(wide(self._scores()) / softcap)
        return (1 - capped**2).to(self.q.dtype)

    def _scores(self) -> Tensor:
        return torch.bmm(self.q, self.k.transpose(1, 2))


def _keys(x: Tensor, chunks: NodeChunks) -> Tensor:
    """(1, H_kv, T, h) -> (H_kv * S, A + Lq, h): every chunk's ancestors, then its own nodes."""
    if chunks.stretches:  # a copy: products with it are a fifth faster than with what lies apart
        return torch.cat([x[0, :, nodes] for nodes in chunks.stretches], dim=1)
    x = x[0].transpose(0, 1)
    own = chunks.by_node(x[chunks.start : chunks.end])
    both = torch.cat([x[chunks.ancestors], own], dim=1)  # (S, A + Lq, H_kv, h)
    return both.permute(2, 0, 1, 3).reshape(-1, *chunks.key_nodes.shape[1:], x.shape[2])


def _zeros_by_node(x: Tensor) -> Tensor:
    """(1, H_kv, T, h) -> (T, H_kv, h) zeros, in which many chunks' gradients can be summed."""
    _, n_kv, n_nodes, head_dim = x.shape
    return x.new_zeros(n_nodes, n_kv, head_dim, dtype=wide_dtype(x.dtype))


def _add_keys(total: Tensor, d: Tensor, chunks: NodeChunks) -> None:
    """Transpose of `_keys`: add d (H_kv * S, A + Lq, h) to total (T, H_kv, h) in its dtype."""
    if chunks.stretches:
        sizes = [nodes.stop - nodes.start for nodes in chunks.stretches]
        for nodes, d_nodes in zip(chunks.stretches, d.split(sizes, dim=1), strict=True):
            total[nodes] += d_nodes.transpose(0, 1)
        return
    d = d.view(-1, *chunks.key_nodes.shape, d.shape[-1]).permute(1, 2, 0, 3)  # (S, A + Lq, H_kv, h)
    n_ancestors = chunks.n_ancestors
    own = d[:, n_ancestors:].reshape(-1, *total.shape[1:])[: chunks.n_nodes]
    total[chunks.start : chunks.end] += own
    if n_ancestors:
        shared = d[:, :n_ancestors].reshape(-1, *total.shape[1:]).to(total.dtype)
        total.index_add_(0, chunks.ancestors.flatten(), shared)
