"""Nodes in chunks: what each sees, and that nothing is lost on the way there and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.trees import path_mask, random_tree

from swlora.kernels.tree_layout import TreeLayout

CPU = torch.device("cpu")


@given(
    seed=st.integers(0, 10_000),
    n_nodes=st.integers(1, 400),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    window=st.sampled_from([None, 1, 7]),
    gather_cost=st.sampled_from([0, 16]),
)
@settings(max_examples=60, deadline=None)
def test_a_stretch_sees_the_paths_of_its_nodes(
    seed: int, n_nodes: int, bounds: tuple[float, float], window: int | None, gather_cost: int
) -> None:
    tree = random_tree(seed, n_nodes)
    n = len(tree.token_ids)
    start, end = sorted(int(bound * n) for bound in bounds)
    end = max(end, start + 1) if start < n else n
    start = min(start, end - 1)
    layout = TreeLayout(tree, CPU)
    chunks = layout.cut(start, end, gather_cost=gather_cost)
    visible = layout.visible(chunks, window)
    found = torch.zeros(end - start, n, dtype=torch.int64)
    for chunk, keys in enumerate(chunks.key_nodes):
        for i in range(
            chunk * chunks.chunk_nodes, min((chunk + 1) * chunks.chunk_nodes, len(found))
        ):
            seen = visible[chunk, i - chunk * chunks.chunk_nodes]
            found[i] = torch.bincount(keys[seen], minlength=n)
    assert torch.equal(found, path_mask(tree, window)[start:end].long())  # each key once


@pytest.mark.parametrize("n_nodes", [1, 63, 64, 65, 300])
def test_queries_come_back_as_they_were(n_nodes: int) -> None:
    layout = TreeLayout(random_tree(n_nodes, n_nodes), CPU)
    x = torch.randn(1, 6, layout.n_nodes, 5)
    split = layout.chunks.split_queries(x, 2)
    assert split.shape == (2 * layout.chunks.n_chunks, 3 * layout.chunks.chunk_nodes, 5)
    assert torch.equal(layout.chunks.merge_queries(split), x.transpose(1, 2))
