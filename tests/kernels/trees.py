"""Random prefix trees, and who sees whom in them."""

import numpy as np
import torch
from torch import Tensor

from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.token_sequences import TokenSequences


def random_tree(seed: int, n_nodes: int) -> PrefixTree:
    """A random forest of about n_nodes nodes or more: bushy, deep or in between."""
    rng = np.random.default_rng(seed)
    longest = int(rng.integers(2, 2 + n_nodes))
    trunk = rng.integers(0, int(rng.integers(1, 4)), longest).tolist()
    pairs, total = [], 0
    while total < n_nodes:
        kept = trunk[int(rng.integers(0, 2)) : int(rng.integers(2, longest + 1))]
        tail = rng.integers(0, 50, int(rng.integers(2, 30))).tolist()
        pairs.append((kept, tail))
        total += len(tail) - 1
    sequences = TokenSequences.from_lists(pairs)
    return build_tree(sequences, np.arange(len(sequences)))


def path_mask(tree: PrefixTree, window: int | None) -> Tensor:
    """(T, T): key j lies on the path from the root to node i, the last `window` nodes of it."""
    n = len(tree.token_ids)
    visible = torch.zeros(n, n, dtype=torch.bool)
    path: list[int] = []
    for i in range(n):
        path = [*path[: int(tree.position_ids[i])], i]  # depth first: the path changes at its end
        visible[i, path[-window:] if window else path] = True
    return visible
