"""Forwards for inference that computes a few rows at a time, again and again.

Weights are laid out for the kernels once (`swlora.kernels.linear.backends`), and maps of one input
(query, key and value; gate and up) become one product:

    [y1 | y2] = x [W1; W2]' + (x [A1; A2]') diag(s1 B1', s2 B2')
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swlora.adapters.base_model import base_model_of
from swlora.adapters.methods import adapted_modules
from swlora.decoding.blocks import block_forwards
from swlora.kernels.forwards import fast_forwards
from swlora.kernels.linear.backends import PackedProducts
from swlora.kernels.lora import FastDora, FastLora
from swlora.models.anatomy import Anatomy, weight_out_in

_Forward = Callable[[Tensor], Tensor]


def decode_forwards(model: Any) -> dict[nn.Module, Callable[..., Tensor]]:
    """Return the forwards of a model in its present state, a PeftModel or the base model in it.

    The base model's weights may change in place later on; which adapter is active, and the
    adapter's weights, may not. Copies of weights are shared with all who hold copies of the same,
    and go with the last of them.
    """
    forwards = fast_forwards(model)
    base_model = base_model_of(model)
    adapters = set(adapted_modules(model).values())
    stacked: dict[tuple[nn.Module, ...], _StackedMaps] = {}
    for modules in _maps_by_input(base_model):
        maps = [m.base_layer if m in adapters and hasattr(m, "base_layer") else m for m in modules]
        if all(map(PackedProducts.takes, maps)):
            stacked |= _stacked(modules, maps, forwards)
    forwards |= {m: maps.part(i) for own, maps in stacked.items() for i, m in enumerate(own)}
    products = {own: maps.product for own, maps in stacked.items()}
    return forwards | block_forwards(Anatomy(base_model).blocks, products, forwards)


def _maps_by_input(base_model: Any) -> Iterator[list[Any]]:
    """Yield the head, then the projections of every block, those of one input together."""
    anatomy = Anatomy(base_model)
    yield [anatomy.head]
    family = anatomy.family
    for layer in range(anatomy.n_layers):
        by_name = {p.name: p.module for p in anatomy.projections(layer)}
        for names in (family.attention_in, [family.attention_out], family.mlp_in, [family.mlp_out]):
            if found := [by_name[name] for name in names if name in by_name]:
                yield found


def _stacked(
    modules: Sequence[Any], maps: Sequence[Any], forwards: Mapping[nn.Module, Any]
) -> dict[tuple[nn.Module, ...], "_StackedMaps"]:
    """Return modules with one input as groups of one product, as far as there is room for copies.

    `maps` are the linear maps in the modules.
    """
    loras: list[FastLora | None] = []
    for module, base in zip(modules, maps, strict=True):
        forward = forwards.get(module)
        if isinstance(forward, FastLora) and not isinstance(forward, FastDora):
            loras.append(forward)
        elif module is base or (module.disable_adapters and not module.merged):
            loras.append(None)
    if len(loras) == len(maps):
        groups = {tuple(modules): _StackedMaps(maps, loras)}
    else:  # an adapter of another kind, DoRA for one, calls the maps that it wraps
        groups = {(base,): _StackedMaps([base], [None]) for base in maps}
    return {own: group for own, group in groups.items() if group.reserve()}


class _StackedMaps:
    """Linear maps with their LoRA updates, computed together when the first is called."""

    def __init__(self, maps: Sequence[Any], loras: Sequence[FastLora | None]) -> None:
        self._maps, self._loras = maps, loras
        self._has_lora = any(lora is not None for lora in loras)
        self._has_bias = any(m.bias is not None for m in maps)
        self._products = PackedProducts(maps)
        self.reserve = self._products.reserve
        sizes = [weight_out_in(m).shape[0] for m in maps]
        self._bounds = list(pairwise([sum(sizes[:i]) for i in range(len(sizes) + 1)]))
        self._adapter: tuple[Tensor, Tensor] | None = None
        self._x: Tensor | None = None
        self._y: Tensor | None = None

    def part(self, i: int) -> _Forward:
        """Return the forward of the i-th map."""
        start, end = self._bounds[i]
        is_last = i == len(self._maps) - 1

        def forward(x: Tensor) -> Tensor:
            if x is not self._x:  # kept until the last map has had it, so it is no other tensor
                y = self.product(x.reshape(-1, x.shape[-1]))
                self._x, self._y = x, y.view(*x.shape[:-1], -1)
            assert self._y is not None
            y = self._y[..., start:end]
            if is_last:
                self._x = self._y = None
            return y

        return forward

    def product(self, rows: Tensor) -> Tensor:
        """Return what the maps say of rows (N, in), side by side: (N, out), a new tensor."""
        y = self._products.product(rows, self._bias(rows) if self._has_bias else None)
        if self._has_lora:
            a, b = self._matrices(rows)
            y.addmm_(F.linear(rows, a), b)
        return y

    def _bias(self, rows: Tensor) -> Tensor:
        biases = [m.bias for m in self._maps]
        if len(biases) == 1:
            return biases[0]  # type: ignore[no-any-return]
        sizes = [end - start for start, end in self._bounds]
        return torch.cat(
            [rows.new_zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)]
        )

    def _matrices(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the adapters' A (r, in) and scaled B (r, out), stacked; made and cast once."""
        if self._adapter is None:
            all_a, all_b = [], []
            for lora, (start, end) in zip(self._loras, self._bounds, strict=True):
                if lora is not None:
                    a, b = lora.matrices()
                    all_a.append(a)
                    before, behind = start, self._bounds[-1][1] - end
                    all_b.append(F.pad((b * lora.scale).t(), (before, behind)))
            self._adapter = torch.cat(all_a).to(rows.dtype), torch.cat(all_b).to(rows.dtype)
        return self._adapter
