"""Nodes in chunks: what each sees, and that nothing is lost on the way there and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.trees import path_mask, random_tree

from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.kernels.tree_layout import MOST_SCORES, PATH_NODES, NodeChunks, TreeLayout

CPU = torch.device("cpu")


@given(
    seed=st.integers(0, 10_000),
    n_nodes=st.integers(1, 400),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    window=st.sampled_from([None, 1, 7]),
    cut_window=st.booleans(),
    gather_cost=st.sampled_from([0, 16]),
)
@settings(max_examples=60, deadline=None)
def test_a_stretch_sees_the_paths_of_its_nodes(
    seed: int,
    n_nodes: int,
    bounds: tuple[float, float],
    window: int | None,
    cut_window: bool,
    gather_cost: int,
) -> None:
    tree = random_tree(seed, n_nodes)
    n = len(tree.token_ids)
    start, end = sorted(int(bound * n) for bound in bounds)
    end = max(end, start + 1) if start < n else n
    start = min(start, end - 1)
    layout = TreeLayout(tree, CPU)
    cut_for = window if cut_window else None
    chunks = layout.cut(start, end, window=cut_for, gather_cost=gather_cost)
    found = nodes_seen(layout, chunks, window)
    assert torch.equal(found, path_mask(tree, window)[start:end].long())  # each key once


def nodes_seen(layout: TreeLayout, chunks: NodeChunks, window: int | None) -> torch.Tensor:
    """How often each query of the chunks sees each node of the tree."""
    visible = layout.visible(chunks, window)
    found = torch.zeros(chunks.n_nodes, layout.n_nodes, dtype=torch.int64)
    for chunk, keys in enumerate(chunks.key_nodes):
        for i in range(
            chunk * chunks.chunk_nodes, min((chunk + 1) * chunks.chunk_nodes, len(found))
        ):
            seen = visible[chunk, i - chunk * chunks.chunk_nodes]
            found[i] = torch.bincount(keys[seen], minlength=layout.n_nodes)
    return found


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("shape", ["path", "star", "random"])
def test_parts_hold_every_node_once_and_few_scores(shape: str, window: int | None) -> None:
    n = 3000
    pairs = {
        "path": [([1], [2] * n)],
        "star": [([1] * 300, [k, *[2] * 30]) for k in range(90)],
        "random": [([1] * (1 + k % 7 * 90), [k, *[2] * (k % 200)]) for k in range(40)],
    }[shape]
    tree = build_tree(TokenSequences.from_lists(pairs), np.arange(len(pairs)))
    layout = TreeLayout(tree, CPU)
    parts = layout.parts(window)
    edges = [0, *(part.end for part in parts)]
    assert [part.start for part in parts] == edges[:-1] and edges[-1] == layout.n_nodes
    assert shape != "path" or window or all(len(part.stretches) == 1 for part in parts)
    for part in parts:
        if part.stretches:
            nodes = [i for run in part.stretches for i in range(run.start, run.stop)]
            assert part.key_nodes.tolist() == [nodes]
    found = torch.cat([nodes_seen(layout, part, window) for part in parts])
    visible = path_mask(tree, window)
    assert torch.equal(found, visible.long())
    for part in parts:  # what has no mask is seen by all, and is all that all see, but for a window
        seen_by_all = layout.visible(part, window)[..., : part.n_ancestors].all(dim=1).all(dim=0)
        assert part.n_open == (0 if window else int(seen_by_all.sum()))
    n_scores = sum(part.n_scores for part in parts)
    assert n_scores < 1.4 * int(visible.sum()) + 160 * layout.n_nodes
    assert max(part.n_scores for part in parts) <= max(MOST_SCORES, 64 * (layout.n_nodes + 64))


@pytest.mark.parametrize("n_nodes", [1, 63, 64, 65, 300])
def test_queries_come_back_as_they_were(n_nodes: int) -> None:
    layout = TreeLayout(random_tree(n_nodes, n_nodes), CPU)
    x = torch.randn(1, 6, layout.n_nodes, 5)
    chunks = layout.cut(0, layout.n_nodes)
    split = chunks.split_queries(x, 2)
    assert split.shape == (2 * chunks.n_chunks, 3 * chunks.chunk_nodes, 5)
    assert torch.equal(chunks.merge_queries(split), x.transpose(1, 2))


def test_a_path_is_cut_into_few_parts() -> None:
    tree = build_tree(TokenSequences.from_lists([([1], [2] * 2048)]), np.array([0]))
    parts = TreeLayout(tree, CPU).parts(None)
    late = [part for part in parts if part.start >= PATH_NODES]
    assert [part.n_nodes for part in late] == [PATH_NODES] * 7
    assert all(part.n_open == part.n_ancestors == part.start for part in late)


def test_long_branches_are_cut_where_they_begin_and_copied_instead_of_gathered() -> None:
    n_stem, n_branch = 40, 600
    pairs = [([1] * n_stem, [k, *[2] * n_branch]) for k in range(3)]
    parts = TreeLayout(build_tree(TokenSequences.from_lists(pairs), np.arange(3)), CPU).parts(None)
    begins = [n_stem + k * n_branch for k in range(4)]
    assert set(begins[1:]) <= {part.end for part in parts}
    for part in parts:
        branch = (max(part.start - n_stem, 0)) // n_branch
        runs = [(0, n_stem), (begins[branch], part.end)] if branch else [(0, part.end)]
        assert [(run.start, run.stop) for run in part.stretches] == runs
        assert part.n_open == part.n_ancestors and part.n_nodes <= PATH_NODES


@pytest.mark.parametrize(
    "tails",
    [[0], [400], [400, 400], [3, 400, 5], [400, 3, 400, 3], [300] * 3, [3] * 9],
)
def test_paths_and_the_parts_beside_them_hold_every_node_once(tails: list[int]) -> None:
    """And a path's nodes see its ancestors and those of its nodes that are not below."""
    pairs = [([1] * 20, [2 + k, *[9] * n]) for k, n in enumerate(tails)]
    pairs += [([0], [5] * 270), ([0, 5, 5], [6])]  # another root
    tree = build_tree(TokenSequences.from_lists(pairs), np.arange(len(pairs)))
    layout = TreeLayout(tree, CPU)
    parts = layout.parts(None, beside_paths=True)
    edges = [(part.start, part.end) for part in parts]
    edges += [(path.nodes.start, path.nodes.stop) for path in layout.paths]
    starts, ends = zip(*sorted(edges), strict=True)
    assert [0, *ends] == [*starts, layout.n_nodes]
    assert len(layout.paths) == 1 + sum(n >= PATH_NODES for n in tails)
    visible = path_mask(tree, None)
    for path in layout.paths:
        start, stop = path.nodes.start, path.nodes.stop
        own = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        assert torch.equal(visible[path.nodes, path.nodes], own)
        seen = torch.zeros(start, dtype=torch.bool).scatter(0, path.ancestors, True)
        assert torch.equal(visible[path.nodes, :start], seen.expand(stop - start, -1))
