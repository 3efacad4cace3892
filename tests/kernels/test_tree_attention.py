"""Attention over prefix trees against a dense masked softmax in float64."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.trees import path_mask, random_tree
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError
from swlora.kernels import tree_layout
from swlora.kernels.attention_interface import Scoring
from swlora.kernels.tree_attention import tree_attention
from swlora.kernels.tree_layout import FEW_KEYS, PATH_NODES, TreeLayout


class Shape(NamedTuple):
    """Heads, key heads, head width."""

    n_heads: int
    n_kv: int
    width: int


def make_inputs(tree: PrefixTree, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(len(tree.token_ids))
    n = len(tree.token_ids)
    return tuple(
        torch.randn(1, heads, n, shape.width, generator=generator, dtype=dtype)
        for heads in (shape.n_heads, shape.n_kv, shape.n_kv, shape.n_heads)
    )


def dense(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """(1, H, T, h) -> (1, T, H, h), one head at a time."""
    out = []
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        scores = scale * q[0, head] @ k[0, shared].T
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        p = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
        out.append(p @ v[0, shared])
    return torch.stack(out, dim=1)[None]


def run(
    tree: PrefixTree,
    inputs: tuple[Tensor, ...],
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Output and gradients of the three inputs, for inputs (q, k, v, gradient of the output)."""
    q, k, v, d_out = inputs
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    layout = TreeLayout(tree, q.device)
    out = tree_attention(layout, q, k, v, Scoring(scale, window, softcap))
    return out, *torch.autograd.grad(out, (q, k, v), d_out.transpose(1, 2))


def reference(
    tree: PrefixTree,
    inputs: tuple[Tensor, ...],
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, ...]:
    q, k, v, d_out = (x.double() for x in inputs)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = dense(q, k, v, path_mask(tree, window), scale, softcap)
    return out, *torch.autograd.grad(out, (q, k, v), d_out.transpose(1, 2))


def relative_errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    return [
        float((f.detach().double() - e.detach()).norm() / e.detach().norm().clamp(min=1e-12))
        for f, e in zip(found, expected, strict=True)
    ]


shapes = st.sampled_from([Shape(1, 1, 5), Shape(4, 4, 3), Shape(6, 2, 4), Shape(3, 1, 8)])


@given(
    seed=st.integers(0, 10_000),
    n_nodes=st.integers(1, 150),
    shape=shapes,
    window=st.sampled_from([None, 1, 2, 7, 40]),
    softcap=st.sampled_from([None, 1.5]),
    scale=st.sampled_from([0.3, 0.7]),
    path_nodes=st.sampled_from([1, 2, 7, PATH_NODES]),
)
@settings(max_examples=200, deadline=None)
def test_equals_a_dense_masked_softmax(
    seed: int,
    n_nodes: int,
    shape: Shape,
    window: int | None,
    softcap: float | None,
    scale: float,
    path_nodes: int,
) -> None:
    tree = random_tree(seed, n_nodes)
    inputs = make_inputs(tree, shape, torch.float64)
    options = (window, softcap, scale)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tree_layout, "PATH_NODES", path_nodes)
        found = run(tree, inputs, *options)
    assert max(relative_errors(found, reference(tree, inputs, *options))) < 1e-12


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("seed", range(4))
def test_long_trees(seed: int, window: int | None, softcap: float | None) -> None:
    tree = random_tree(seed, 700)
    assert len(tree.token_ids) > 300
    inputs = make_inputs(tree, Shape(4, 2, 8), torch.float64)
    options = (window, softcap, 0.3)
    assert (
        max(relative_errors(run(tree, inputs, *options), reference(tree, inputs, *options))) < 1e-12
    )


@pytest.mark.parametrize("n_nodes", [1, 2, 63, 64, 65, 127, 128, 129, 200, 513])
def test_a_single_path_of_any_length(n_nodes: int) -> None:
    tree = build_tree(TokenSequences.from_lists([([3], [4] * n_nodes)]), np.array([0]))
    assert len(tree.token_ids) == n_nodes
    inputs = make_inputs(tree, Shape(2, 1, 4), torch.float64)
    found = run(tree, inputs, None, None, 0.3)
    assert max(relative_errors(found, reference(tree, inputs, None, None, 0.3))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tails", [[900], [700, 2, 300], [5, 400, 5, 400], [150] * 4])
def test_long_stems_and_long_branches(tails: list[int], dtype: torch.dtype) -> None:
    pairs = [([1] * 300, [2 + k, *[3] * n]) for k, n in enumerate(tails)]
    tree = build_tree(TokenSequences.from_lists(pairs), np.arange(len(pairs)))
    inputs = make_inputs(tree, Shape(6, 2, 8), dtype)
    found = run(tree, inputs, None, None, 0.3)
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert max(relative_errors(found, reference(tree, inputs, None, None, 0.3))) < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_paths_below_ancestors_that_lie_apart(dtype: torch.dtype) -> None:
    stem, turn = [1] * 20, [6] * 30
    branches = [[4, 5], [*turn, 2, 7, 8], [*turn, 9, *[3] * PATH_NODES], [*turn, *[5] * 280], [8]]
    pairs = [(stem, branch) for branch in branches]
    tree = build_tree(TokenSequences.from_lists(pairs), np.arange(len(pairs)))
    paths = TreeLayout(tree, torch.device("cpu")).paths
    assert len(paths) == 2
    assert all(len(np.flatnonzero(np.diff(path.ancestors) > 1)) == 1 for path in paths)
    inputs = make_inputs(tree, Shape(6, 2, 8), dtype)
    bound = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
    for options in ((None, None, 0.3), (40, None, 0.3), (None, 2.0, 0.3)):
        found = run(tree, inputs, *options)
        assert max(relative_errors(found, reference(tree, inputs, *options))) < bound


@pytest.mark.parametrize(
    ("dtype", "window", "softcap", "n_calls"),
    [
        (torch.float32, None, None, 1),
        (torch.float32, 40, None, 0),
        (torch.float32, None, 2.0, 0),
        (torch.bfloat16, None, None, 0),
    ],
)
def test_the_fused_kernel_is_for_what_it_can_and_gains(
    dtype: torch.dtype, window: int | None, softcap: float | None, n_calls: int
) -> None:
    tree = build_tree(TokenSequences.from_lists([([3], [4] * PATH_NODES)]), np.array([0]))
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run(tree, make_inputs(tree, Shape(2, 1, 4), dtype), window, softcap, 0.3)
    calls = [event.key for event in record.events()]
    assert sum("flash_attention_for_cpu_backward" in name for name in calls) == n_calls


def test_a_forest_of_single_nodes() -> None:
    pairs = [([token], [0]) for token in range(300)]
    tree = build_tree(TokenSequences.from_lists(pairs), np.arange(300))
    q, k, v, d_out = make_inputs(tree, Shape(2, 2, 4), torch.float64)
    out, d_q, d_k, d_v = run(tree, (q, k, v, d_out), None, None, 0.3)
    torch.testing.assert_close(out, v.transpose(1, 2))
    torch.testing.assert_close(d_v, d_out)
    assert float(d_q.abs().max()) < 1e-12 and float(d_k.abs().max()) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("window", [None, 20])
def test_rounding_is_that_of_the_dtype(
    dtype: torch.dtype, bound: float, window: int | None
) -> None:
    tree = random_tree(5, 500)
    inputs = make_inputs(tree, Shape(4, 2, 16), dtype)
    found = run(tree, inputs, window, None, 0.3)
    assert all(x.dtype == dtype for x in found)
    errors = relative_errors(found, reference(tree, inputs, window, None, 0.3))
    assert max(errors) < bound


@pytest.mark.parametrize("window", [None, 50])  # with and without the fused kernel in float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite(dtype: torch.dtype, window: int | None) -> None:
    tree = two_long_paths()
    q, k, v, d_out = make_inputs(tree, Shape(2, 2, 8), dtype)
    found = run(tree, (q * 100, k * 100, v, d_out), window, None, 0.3)
    assert all(bool(x.isfinite().all()) for x in found)
    assert float(found[0].detach().abs().max()) <= float(v.abs().max()) * 1.01  # an average of v


@pytest.mark.parametrize("score", [50.0, 1000.0])
def test_what_all_keys_share_leaves_the_gradients_exact(score: float) -> None:
    """In the fused kernel alone it does not: findings/torch_cpu_attention_shared_key.sh."""
    tree = two_long_paths()
    q, k, v, d_out = make_inputs(tree, Shape(4, 2, 8), torch.float32)
    q[..., 0], k[..., 0] = 1, score / 0.3
    inputs = (q, k, v, d_out)
    errors = relative_errors(
        run(tree, inputs, None, None, 0.3), reference(tree, inputs, None, None, 0.3)
    )
    assert max(errors) < 5e-6


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_that_is_not_above_0(scale: float) -> None:
    tree = two_long_paths()
    inputs, options = make_inputs(tree, Shape(4, 2, 8), torch.float64), (None, None, scale)
    found, expected = run(tree, inputs, *options), reference(tree, inputs, *options)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def two_long_paths() -> PrefixTree:
    rows = [([1] * 30, [2] * 300), ([1] * 30, [3] * 270)]
    return build_tree(TokenSequences.from_lists(rows), np.arange(len(rows)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_backward_is_linear_in_the_nodes(dtype: torch.dtype) -> None:
    n_heads, n_kv, width = 2, 1, 4
    for n_nodes in (1000, 2000, 4000):
        tree = build_tree(TokenSequences.from_lists([([3], [4] * n_nodes)]), np.array([0]))
        q, k, v, _ = make_inputs(tree, Shape(n_heads, n_kv, width), dtype)
        layout, n_bytes = TreeLayout(tree, q.device), 0

        def count(x: Tensor) -> Tensor:
            nonlocal n_bytes
            n_bytes += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            tree_attention(layout, q.requires_grad_(), k, v, Scoring(0.3))
        masks = sum(mask.numel() * mask.element_size() for mask in layout._masks.values())
        inputs = (n_heads + 2 * n_kv) * width * q.element_size() * n_nodes
        if dtype == torch.float32:  # the outcome, and a logarithm for each head
            assert n_bytes == inputs + n_heads * (width + 1) * 4 * n_nodes
            assert masks == 0
        else:  # the first stretches of 64 nodes see few keys
            few = 64 * FEW_KEYS * n_heads * 2
            assert inputs <= n_bytes < inputs + 4 * few
            assert masks <= n_nodes * PATH_NODES * 4  # once for all layers


def test_a_window_beyond_the_longest_sequence_is_none() -> None:
    tree = random_tree(3, 400)
    inputs = make_inputs(tree, Shape(4, 2, 8), torch.float64)
    n_deepest = int(tree.position_ids.max()) + 1
    for window in (n_deepest - 1, n_deepest, tree.longest_tokens, tree.longest_tokens + 50):
        found = run(tree, inputs, window, None, 0.3)
        expected = reference(tree, inputs, window, None, 0.3)
        assert max(relative_errors(found, expected)) < 1e-12
    whole = run(tree, inputs, None, None, 0.3)
    assert all(map(torch.equal, run(tree, inputs, tree.longest_tokens, None, 0.3), whole))


def test_heads_whose_values_lie_apart_are_right() -> None:
    tree = build_tree(TokenSequences.from_lists([([3], [4] * 300)]), np.array([0]))
    inputs = make_inputs(tree, Shape(2, 1, 4), torch.float64)
    apart = tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs)
    assert all(x.stride(-1) != 1 for x in apart)
    layout = TreeLayout(tree, torch.device("cpu"))
    for number in range(3):
        q, k, v = (apart[i] if i == number else x for i, x in enumerate(inputs[:3]))
        found = tree_attention(layout, q, k, v, Scoring(0.3))
        expected = dense(q, k, v, path_mask(tree, None), 0.3, None)
        assert relative_errors((found,), (expected,))[0] < 1e-12


def test_a_batch_is_refused() -> None:
    tree = random_tree(0, 20)
    q, k, v = (x.repeat(2, 1, 1, 1) for x in make_inputs(tree, Shape(2, 2, 4), torch.float32)[:3])
    with pytest.raises(RunFailedError, match="a batch of one"):
        tree_attention(TreeLayout(tree, q.device), q, k, v, Scoring(1))
