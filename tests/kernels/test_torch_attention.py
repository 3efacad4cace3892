"""Attention by torch's kernels against a dense masked softmax in float64, on a CPU.

flex_attention computes no gradients here, and is compiled by the "eager" backend: the same tracing,
guards and masks as on a GPU, without its kernels.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.test_tree_attention import (
    Shape,
    dense,
    make_inputs,
    reference,
    relative_errors,
    shapes,
)
from tests.kernels.trees import path_mask, random_tree
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.kernels import torch_attention
from swlora.kernels.attention_interface import Scoring
from swlora.kernels.torch_attention import BLOCK, block_mask, flex, n_compiled, seen_blocks
from swlora.kernels.tree_layout import TreeLayout

WINDOWS = [None, 1, 7, 40, 200]


@pytest.fixture
def traced_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flex_attention as it is compiled, but for the kernels."""
    torch_attention._compiled_flex()  # its settings
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=True, backend="eager")
    monkeypatch.setattr(torch_attention, "_compiled_flex", lambda: compiled)
    monkeypatch.setattr(torch_attention, "MOST_COMPILED", 10_000)
    yield
    torch._dynamo.reset()


def layout_of(tree: PrefixTree) -> TreeLayout:
    return TreeLayout(tree, torch.device("cpu"))


def path(n_nodes: int) -> PrefixTree:
    return build_tree(TokenSequences.from_lists([([3], [4] * n_nodes)]), np.array([0]))


@given(
    seed=st.integers(0, 10_000),
    n_nodes=st.integers(1, 150),
    shape=shapes,
    window=st.sampled_from(WINDOWS),
    scale=st.sampled_from([0.3, 0.7]),
)
@settings(max_examples=60, deadline=None)
def test_a_mask_of_all_pairs_gives_result_and_gradients(
    seed: int, n_nodes: int, shape: Shape, window: int | None, scale: float
) -> None:
    tree = random_tree(seed, n_nodes)
    inputs = make_inputs(tree, shape, torch.float64)
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    out = torch_attention.dense(layout_of(tree), q, k, v, Scoring(scale, window))
    found = (out, *torch.autograd.grad(out, (q, k, v), inputs[3].transpose(1, 2)))
    for one, expected in zip(found, reference(tree, inputs, window, None, scale), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-12)  # a node alone has none


def test_a_mask_of_all_pairs_refuses_a_soft_cap() -> None:
    tree = random_tree(0, 20)
    q, k, v, _ = make_inputs(tree, Shape(2, 2, 4), torch.float32)
    with pytest.raises(ValueError, match="soft cap"):
        torch_attention.dense(layout_of(tree), q, k, v, Scoring(1.0, None, 2.0))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("shape", [Shape(4, 4, 8), Shape(6, 2, 16)])
def test_flex_gives_the_result(traced_flex: None, shape: Shape, softcap: float | None) -> None:
    for seed, n_nodes, window in [(1, 60, None), (2, 700, None), (3, 700, 9), (4, 1, 2)]:
        tree = random_tree(seed, n_nodes)
        q, k, v, _ = make_inputs(tree, shape, torch.float64)
        expected = dense(q, k, v, path_mask(tree, window), 0.3, softcap)
        with torch.no_grad():
            out = flex(layout_of(tree), q, k, v, Scoring(0.3, window, softcap))
        assert relative_errors((out,), (expected,))[0] < 1e-12


def test_lengths_and_windows_share_what_was_compiled(traced_flex: None) -> None:
    def run(n_nodes: int, window: int | None) -> int:
        tree = random_tree(n_nodes, n_nodes)
        q, k, v, _ = make_inputs(tree, Shape(2, 1, 16), torch.float32)
        with torch.no_grad():
            for _layer in range(2):
                flex(layout_of(tree), q, k, v, Scoring(0.3, window))
        return n_compiled()

    start = n_compiled()
    first = [run(40, None), run(900, None), run(1300, 30)][-1]
    assert first - start <= 4
    lengths = [(300, None), (511, 8), (1100, 25), (1400, None), (1700, 3), (2000, None)]
    assert [run(*one) for one in lengths][-1] == first


def test_compiling_too_often_is_an_error(
    traced_flex: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_attention, "MOST_COMPILED", n_compiled())
    tree = random_tree(0, 20)
    q, k, v, _ = make_inputs(tree, Shape(2, 2, 16), torch.float32)
    with pytest.raises(torch_attention.CompiledTooOftenError, match="times"):
        flex(layout_of(tree), q, k, v, Scoring(1.0))


def test_torch_may_compile_more_often_than_is_counted() -> None:
    torch_attention._compiled_flex()
    assert torch._dynamo.config.recompile_limit > torch_attention.MOST_COMPILED


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seed", range(4))
def test_blocks_that_are_left_out_are_seen_by_nobody(seed: int, window: int | None) -> None:
    tree = path(1500) if seed == 0 else random_tree(seed, 1000)
    n = len(tree.token_ids)
    blocks = seen_blocks(tree, window)
    n_padded = len(blocks.full) * BLOCK
    visible = torch.eye(n_padded, dtype=torch.bool)
    visible[:n, :n] = path_mask(tree, window)
    by_block = visible.view(-1, BLOCK, n_padded // BLOCK, BLOCK).transpose(1, 2).flatten(2).numpy()
    assert not (blocks.full & blocks.partial).any()
    assert by_block[blocks.full].all()
    assert not by_block[~blocks.full & ~blocks.partial].any()
    if window is None:
        assert (by_block.any(-1) == (blocks.full | blocks.partial)).all()
        whole = by_block.all(-1)
        assert (whole == blocks.full).all()


def test_a_path_leaves_out_half_of_the_blocks_and_a_window_most() -> None:
    n_blocks = 16
    tree = path(n_blocks * BLOCK)
    every = seen_blocks(tree, None)
    assert every.full.sum() == n_blocks * (n_blocks - 1) // 2 and every.partial.sum() == n_blocks
    near = seen_blocks(tree, BLOCK)
    assert near.full.sum() == 0 and near.partial.sum() == 2 * n_blocks - 1


@pytest.mark.parametrize("seed", range(3))
def test_the_block_mask_is_that_of_torch(seed: int) -> None:
    tree = random_tree(seed, 1000)
    own = block_mask(layout_of(tree), None)
    n = own.seq_lengths[0]
    assert n % BLOCK == 0 and n >= len(tree.token_ids)
    expected = create_block_mask(own.mask_mod, None, None, n, n, device="cpu")

    def rows(counts: Tensor, indices: Tensor) -> list[list[int]]:
        return [i[:c].tolist() for c, i in zip(counts[0, 0], indices[0, 0], strict=True)]

    for name in ("kv", "q", "full_kv", "full_q"):
        counts, indices = f"{name}_num_blocks", f"{name}_indices"
        found = rows(getattr(own, counts), getattr(own, indices))
        assert found == rows(getattr(expected, counts), getattr(expected, indices)), name


def test_a_mask_is_made_once_for_all_layers() -> None:
    layout = layout_of(random_tree(0, 300))
    assert block_mask(layout, None) is block_mask(layout, None)
    assert block_mask(layout, 5) is not block_mask(layout, None)
