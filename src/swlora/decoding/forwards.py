"""Forwards for inference that computes a few rows at a time, again and again.

Weights are laid out for the kernels once (`swlora.kernels.packed_weight`), and maps of one input
(query, key and value; gate and up) become one product:

    [y1 | y2] = x [W1; W2]' + (x [A1; A2]') diag(s1 B1', s2 B2')
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swlora.adapters.methods import adapted_modules
from swlora.kernels.forwards import fast_modules
from swlora.kernels.lora import FastDora, FastLora
from swlora.kernels.packed_weight import linear, packable, packed_weight
from swlora.kernels.patched_forwards import patched_forwards
from swlora.models.anatomy import Anatomy, weight_out_in

_Forward = Callable[[Tensor], Tensor]


class DecodeForwards:
    """The fast forwards of a model in its present state, a PeftModel or the base model in it.

    The base model's weights may change in place later on; which adapter is active, and the
    adapter's weights, may not. Copies of weights are shared by all objects of this class and live
    as long as the model; they take `PACK_LIMIT_BYTES` at most.
    """

    def __init__(self, model: Any) -> None:
        base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        with fast_modules(model):
            forwards = {m: m.__dict__["forward"] for m in model.modules() if "forward" in vars(m)}
        adapters = set(adapted_modules(model).values())
        groups = []
        for modules in _maps_by_input(base_model):
            bases = (
                m.base_layer if m in adapters and hasattr(m, "base_layer") else m for m in modules
            )
            groups.append((modules, list(bases)))
        chosen = packable(base for _, maps in groups for base in maps)
        for modules, maps in groups:
            if chosen.issuperset(maps):
                forwards |= _packed(modules, maps, forwards)
        self._forwards = forwards

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use them while the body runs."""
        with patched_forwards(self._forwards):
            yield


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


def _packed(
    modules: Sequence[Any], maps: Sequence[Any], forwards: dict[nn.Module, Any]
) -> dict[nn.Module, _Forward]:
    """Return the forwards of modules with one input; `maps` are the linear maps in them."""
    loras: list[FastLora | None] = []
    for module, base in zip(modules, maps, strict=True):
        forward = forwards.get(module)
        if isinstance(forward, FastLora) and not isinstance(forward, FastDora):
            loras.append(forward)
        elif module is base or (module.disable_adapters and not module.merged):
            loras.append(None)
    if len(loras) == len(maps):
        stacked = _StackedMaps(maps, loras)
        return {module: stacked.part(i) for i, module in enumerate(modules)}
    # An adapter of another kind, DoRA for one, calls the maps that it wraps
    return {base: _StackedMaps([base], [None]).part(0) for base in maps}


class _StackedMaps:
    """Linear maps with their LoRA updates, computed together when the first is called."""

    def __init__(self, maps: Sequence[Any], loras: Sequence[FastLora | None]) -> None:
        self._maps, self._loras = maps, loras
        self._weight = packed_weight(maps)
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
                self._x, self._y = x, self._product(x)
            assert self._y is not None
            y = self._y[..., start:end]
            if is_last:
                self._x = self._y = None
            return y

        return forward

    def _product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = linear(rows, self._weight.of(self._maps), self._bias(rows))
        if any(self._loras):
            a, b = self._matrices(rows)
            y.addmm_(F.linear(rows, a), b)
        return y.view(*x.shape[:-1], -1)

    def _bias(self, rows: Tensor) -> Tensor | None:
        biases = [m.bias for m in self._maps]
        if len(biases) == 1 or all(bias is None for bias in biases):
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
