"""Attention of a long path of a prefix tree by torch's fused kernel for CPUs.

A node of a path sees the path up to itself, and all ancestors of its first node. That takes two
calls of the kernel, which gives an outcome o and the logarithms l of the sums of exp(score):

    l = log(exp(l_own) + exp(l_ancestors))
    o = exp(l_own - l) o_own + exp(l_ancestors - l) o_ancestors

Given this o and l, the kernel's backward gives the gradients that come through either part.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from swlora.kernels.attention_interface import Scoring
from swlora.kernels.tree_layout import NodePath

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# In bfloat16 plain products are faster; tests run in float64.
_DTYPES = (torch.float32, torch.float64)


class NodeGradients(NamedTuple):
    """Gradients (H_kv, K, h) of the keys and values of some nodes of the tree."""

    nodes: slice | Tensor
    d_key: Tensor
    d_value: Tensor


def is_fused(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> bool:
    """Say whether long paths attend by the kernel: no window, no soft cap, a scale above 0.

    It reads the values of a head as neighbours without a look at how they lie.
    """
    is_plain = scoring.window is None and scoring.softcap is None and scoring.scale > 0
    is_whole = all(x.stride(-1) == 1 for x in (query, key, value))
    return is_plain and is_whole and query.device.type == "cpu" and query.dtype in _DTYPES


class PathAttention:
    """A path of N nodes: query (1, H, T, h), key and value (1, H_kv, T, h) of all T of the tree.

    The G heads that share a key are a dimension of their own, in which the key is not copied.
    """

    def __init__(
        self, path: NodePath, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> None:
        self._n_kv, self._scale = key.shape[1], scale
        self._q = self._by_group(query[:, :, path.nodes])
        self._key, self._value = key, value
        # What all keys share changes no softmax. Without it the scores are smaller, and so is the
        # error of exp(score - l) in the kernel's backward, which is that of l: about 6e-8 l.
        self._shared = key[0, :, path.nodes].mean(1)[:, None, None]
        # Which nodes are seen, and whether each node of the path sees those up to itself alone
        self._seen: list[tuple[slice | Tensor, bool]] = [(path.nodes, True)]
        if len(path.ancestors):
            self._seen.append((path.ancestors, False))

    def outcome(self) -> tuple[Tensor, Tensor]:
        """Return softmax(scale q k') v, (1, N, H, h), and l, (H_kv, G, N)."""
        out, log_sums = self._of(*self._seen[0])
        for seen in self._seen[1:]:
            o, log_sums_seen = self._of(*seen)
            own, log_sums = log_sums, torch.logaddexp(log_sums, log_sums_seen)
            out = torch.lerp(o, out, torch.exp(own - log_sums)[..., None])
        return out.flatten(0, 1).transpose(0, 1)[None], log_sums

    def gradients(
        self, d_out: Tensor, out: Tensor, log_sums: Tensor
    ) -> tuple[Tensor, list[NodeGradients]]:
        """Return the gradient of its queries, (1, H, N, h) like d_out and out, and of its keys."""
        d_o, o = self._by_group(d_out).contiguous(), self._by_group(out)
        d_q, of_nodes = torch.zeros_like(d_o), []
        for nodes, is_causal in self._seen:
            k, v = self._seen_by(nodes)
            d_q_seen, d_k, d_v = _gradients(
                d_o, self._q, k, v, o, log_sums, 0.0, is_causal, scale=self._scale
            )
            d_q += d_q_seen
            of_nodes.append(NodeGradients(nodes, d_k.sum(1), d_v.sum(1)))
        return d_q.flatten(0, 1)[None], of_nodes

    def _of(self, nodes: slice | Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        k, v = self._seen_by(nodes)
        out, log_sums = _attend(self._q, k, v, 0.0, is_causal, scale=self._scale)
        return out, log_sums

    def _by_group(self, x: Tensor) -> Tensor:
        """(1, H, N, h) -> (H_kv, G, N, h)."""
        return x[0].view(self._n_kv, -1, *x.shape[2:])

    def _seen_by(self, nodes: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return keys, without what all share, and values of some nodes: (H_kv, G, K, h)."""
        k, v = (x[0][:, None, nodes] for x in (self._key, self._value))
        n_groups = self._q.shape[1]
        return (k - self._shared).expand(-1, n_groups, -1, -1), v.expand(-1, n_groups, -1, -1)
