"""Decoder blocks of the most common kind, computed without the calls between their modules.

    h += o(attention(turned(q), turned(k), v))      q, k, v = maps of norm(h), one product
    h += down(silu(g) u)                            g, u = maps of norm(h), one product

Queries and keys are turned together. With one row a token takes about as long to dispatch as to
compute, so every operator and every call of a module that goes is felt. Blocks that differ in
anything, or whose modules are hooked, are computed by their own forward.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swlora.kernels.attention_interface import NAME, attention_forward
from swlora.kernels.fused import gated
from swlora.models.anatomy import attention_window, is_pre_norm_block, swiglu_maps

_Rows = Callable[[Tensor], Tensor]


def block_forwards(
    blocks: Iterable[nn.Module],
    products: Mapping[tuple[nn.Module, ...], _Rows],
    forwards: Mapping[nn.Module, Callable[..., Tensor]],
) -> dict[nn.Module, Callable[..., Tensor]]:
    """Return the forwards of the blocks all of whose parts are known.

    `products` are those of maps with one input, (N, in) -> (N, out); `forwards` the norms'.
    """
    turn = _Turn()
    found = {block: _parts(block, products, forwards) for block in blocks}
    return {
        block: _FastBlock(block, *parts, turn)
        for block, parts in found.items()
        if parts is not None
    }


def _parts(
    block: Any,
    products: Mapping[tuple[nn.Module, ...], _Rows],
    forwards: Mapping[nn.Module, Callable[..., Tensor]],
) -> tuple[list[_Rows], list[_Rows]] | None:
    """Return a block's products and norms, in the order of its forward; None where one lacks."""
    if not is_pre_norm_block(block) or (mlp := swiglu_maps(block.mlp)) is None:
        return None
    own = block.self_attn
    maps = [(own.q_proj, own.k_proj, own.v_proj), (own.o_proj,), (mlp.gate, mlp.up), (mlp.down,)]
    norms = [block.input_layernorm, block.post_attention_layernorm]
    if hasattr(own, "q_norm"):
        norms += [own.q_norm, own.k_norm]
    if not all(m in products for m in maps) or not all(norm in forwards for norm in norms):
        return None
    return [products[m] for m in maps], [forwards[norm] for norm in norms]


class _Turn:
    """Rotary positions of queries and keys: x cos + rotate_half(x) sin, for all blocks."""

    def __init__(self) -> None:
        self._sin: Tensor | None = None  # that of the pass under way
        self._signed: Tensor | None = None

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn x (B, T, heads, h) by cos and sin, (B, T, h)."""
        half = x.shape[-1] // 2
        if sin is not self._sin:
            signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            self._sin, self._signed = sin, signed[:, :, None]
        assert self._signed is not None
        return (x * cos[:, :, None]).addcmul_(x.roll(half, -1), self._signed)


class _FastBlock:
    """The forward of a block, for inference."""

    def __init__(self, block: Any, products: list[_Rows], norms: list[_Rows], turn: _Turn) -> None:
        self._qkv, self._out, self._gate_up, self._down = products
        self._norm, self._mlp_norm, *self._head_norms = norms
        self._plain, self._attention, self._turn = block.forward, block.self_attn, turn
        self._modules = [m for m in block.modules() if m is not block]
        own = self._attention
        self._window, self._is_turned = attention_window(own), getattr(own, "use_rope", True)
        self._n_query = own.q_proj.out_features // own.head_dim
        self._n_turned = self._n_query + own.k_proj.out_features // own.head_dim

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return h (B, T, D) behind the block; arguments are those of its class."""
        cache = kwargs.get("past_key_values", kwargs.get("cache"))  # since transformers 5.24
        if cache is None or args or not self._is_plain():
            return self._plain(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        b, t, width = shape = hidden_states.shape
        heads = self._qkv(self._norm(hidden_states).view(-1, width)).view(
            b, t, -1, self._attention.head_dim
        )
        mask = kwargs.get("attention_mask")
        attended = self._attend(heads, cache, kwargs["position_embeddings"], mask)
        h = self._out(attended.reshape(b * t, -1)).view(shape).add_(hidden_states)
        gate, up = self._gate_up(self._mlp_norm(h).view(-1, width)).chunk(2, dim=-1)
        return self._down(gated(gate, up)).view(shape).add_(h)

    def _is_plain(self) -> bool:
        """Say whether the block attends by our interface and no module in it is hooked."""
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self._modules)
        return self._attention.config._attn_implementation == NAME and not hooked

    def _attend(
        self,
        heads: Tensor,
        cache: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Return (B, T, H, h) for the maps' heads (B, T, H + 2 H_kv, h)."""
        own, n_query = self._attention, self._n_query
        turned, value = heads[:, :, : self._n_turned], heads[:, :, self._n_turned :]
        if self._head_norms:
            pairs = zip(self._head_norms, turned.tensor_split([n_query], dim=2), strict=True)
            turned = torch.cat([norm(x) for norm, x in pairs], dim=2)
        if self._is_turned:
            turned = self._turn(turned, *position_embeddings)
        turned = turned.transpose(1, 2)
        k, v = cache.update(turned[:, n_query:], value.transpose(1, 2), own.layer_idx)
        q = turned[:, :n_query]
        scale, window = own.scaling, self._window
        return attention_forward(own, q, k, v, attention_mask, scale, sliding_window=window)[0]
