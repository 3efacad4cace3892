"""The work that a training step needs, whoever does it, in floating-point operations.

    necessary FLOPs = 2 P T forward and 2 P T for the input gradient above the lowest adapted block
                      + 4 D V S for the head and its gradient

P: weights of a block's frozen matrices, T: nodes, S: scored nodes, D: width, V: vocabulary. Of the
last block only keys and values are needed everywhere, the rest at scored nodes. Attention scores,
adapters, norms and the optimizer are left out: work, but not counted as necessary.
"""

from dataclasses import dataclass
from typing import Any


@dataclass
class Work:
    """What a step function has run so far: nodes, tokens of its sequences, necessary FLOPs.

    `flops` is None where they cannot be counted: experts are chosen token by token.
    """

    n_nodes: int = 0
    n_tokens: int = 0
    flops: float | None = 0.0


class FlopCounter:
    """Counts the necessary FLOPs of trees in a model whose lowest adapted block is `cut`."""

    def __init__(self, anatomy: Any, cut: int) -> None:
        self._can_count = anatomy.family.experts is None
        self._each: dict[bool, tuple[float, float]] = {}  # by whether states below were kept
        self._anatomy, self._cut = anatomy, cut

    def __call__(self, n_nodes: int, n_scored: int, *, prefix_read: bool) -> float | None:
        """Return those of a tree; None where they cannot be counted."""
        if not self._can_count:
            return None
        if prefix_read not in self._each:
            a_node, a_scored = (
                necessary_flops(self._anatomy, self._cut, *counts, prefix_read=prefix_read)
                for counts in ((1, 0), (0, 1))
            )
            self._each[prefix_read] = a_node, a_scored
        a_node, a_scored = self._each[prefix_read]
        return a_node * n_nodes + a_scored * n_scored


def necessary_flops(
    anatomy: Any, cut: int, n_nodes: int, n_scored: int, *, prefix_read: bool
) -> float:
    """Return the FLOPs that a pass needs whose lowest adapted block is `cut`.

    `prefix_read` says that the states below it came from a cache.
    """
    blocks = [_block_weights(anatomy, layer) for layer in range(anatomy.n_layers)]
    total = 0.0
    for layer, (entry, rest) in enumerate(blocks):
        last = layer == anatomy.n_layers - 1
        # Queries belong to the entry; of the last block they are needed at scored nodes only.
        queries = _query_weights(anatomy, layer)
        everywhere, scored = (entry - queries, queries + rest) if last else (entry + rest, 0)
        forward = 2.0 * (everywhere * n_nodes + scored * n_scored)
        if layer >= cut or not prefix_read:
            total += forward
        if layer > cut:
            total += forward
        elif layer == cut:  # what comes into the lowest adapted block needs no gradient
            total += 2.0 * rest * (n_scored if last else n_nodes)
    return total + 4.0 * int(anatomy.head.weight.numel()) * n_scored


def _block_weights(anatomy: Any, layer: int) -> tuple[int, int]:
    """Return the frozen weights that read the block's input, and those of its other matrices."""
    family = anatomy.family
    sizes = {p.name: _frozen(p.module) for p in anatomy.projections(layer)}
    entry = sum(sizes[name] for name in family.attention_in)
    return entry, sum(sizes.values()) - entry


def _query_weights(anatomy: Any, layer: int) -> int:
    names = [n for n in anatomy.family.attention_in if n.endswith("q_proj")]
    return sum(_frozen(p.module) for p in anatomy.projections(layer) if p.name in names)


def _frozen(module: Any) -> int:
    return int(getattr(module, "base_layer", module).weight.numel())
