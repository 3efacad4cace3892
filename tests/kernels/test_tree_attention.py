"""Attention over tree rows against a dense masked softmax in float64."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError
from swlora.kernels.tree_attention import (
    TreeLayout,
    tree_attention,
    tree_attention_forward,
)


class Shape(NamedTuple):
    """Heads, key heads, head width."""

    n_heads: int
    n_kv: int
    width: int


def random_row(seed: int, n_nodes: int) -> PrefixTree:
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


def make_inputs(row: PrefixTree, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(len(row.token_ids))
    n = len(row.token_ids)
    return tuple(
        torch.randn(1, heads, n, shape.width, generator=generator, dtype=dtype)
        for heads in (shape.n_heads, shape.n_kv, shape.n_kv, shape.n_heads)
    )


def path_mask(row: PrefixTree, window: int | None) -> Tensor:
    """(T, T): key j lies on the path from the root to node i, the last `window` nodes of it."""
    n = len(row.token_ids)
    visible = torch.zeros(n, n, dtype=torch.bool)
    path: list[int] = []
    for i in range(n):
        path = [*path[: int(row.position_ids[i])], i]  # depth first: the path changes at its end
        visible[i, path[-window:] if window else path] = True
    return visible


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
    row: PrefixTree,
    inputs: tuple[Tensor, ...],
    window: int | None,
    softcap: float | None,
    scaling: float | None,
) -> tuple[Tensor, ...]:
    """Output and gradients of the three inputs, for inputs (q, k, v, gradient of the output)."""
    q, k, v, d_out = inputs
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    with TreeLayout(row, q.device).active():
        out, weights = tree_attention_forward(
            torch.nn.Identity(),
            q,
            k,
            v,
            None,
            scaling=scaling,
            sliding_window=window,
            softcap=softcap,
        )
    assert weights is None
    return out, *torch.autograd.grad(out, (q, k, v), d_out.transpose(1, 2))


def reference(
    row: PrefixTree,
    inputs: tuple[Tensor, ...],
    window: int | None,
    softcap: float | None,
    scaling: float | None,
) -> tuple[Tensor, ...]:
    q, k, v, d_out = (x.double() for x in inputs)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = dense(q, k, v, path_mask(row, window), scale, softcap)
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
    scaling=st.sampled_from([None, 0.7]),
)
@settings(max_examples=200, deadline=None)
def test_equals_a_dense_masked_softmax(
    seed: int,
    n_nodes: int,
    shape: Shape,
    window: int | None,
    softcap: float | None,
    scaling: float | None,
) -> None:
    row = random_row(seed, n_nodes)
    inputs = make_inputs(row, shape, torch.float64)
    options = (window, softcap, scaling)
    assert (
        max(relative_errors(run(row, inputs, *options), reference(row, inputs, *options))) < 1e-12
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("seed", range(4))
def test_long_rows(seed: int, window: int | None, softcap: float | None) -> None:
    row = random_row(seed, 700)
    assert len(row.token_ids) > 300
    inputs = make_inputs(row, Shape(4, 2, 8), torch.float64)
    options = (window, softcap, None)
    assert (
        max(relative_errors(run(row, inputs, *options), reference(row, inputs, *options))) < 1e-12
    )


@pytest.mark.parametrize("n_nodes", [1, 2, 63, 64, 65, 127, 128, 129, 200, 513])
def test_a_single_path_of_any_length(n_nodes: int) -> None:
    row = build_tree(TokenSequences.from_lists([([3], [4] * n_nodes)]), np.array([0]))
    assert len(row.token_ids) == n_nodes
    inputs = make_inputs(row, Shape(2, 1, 4), torch.float64)
    found = run(row, inputs, None, None, None)
    assert max(relative_errors(found, reference(row, inputs, None, None, None))) < 1e-12


def test_a_forest_of_single_nodes() -> None:
    pairs = [([token], [0]) for token in range(300)]
    row = build_tree(TokenSequences.from_lists(pairs), np.arange(300))
    q, k, v, d_out = make_inputs(row, Shape(2, 2, 4), torch.float64)
    out, d_q, d_k, d_v = run(row, (q, k, v, d_out), None, None, None)
    torch.testing.assert_close(out, v.transpose(1, 2))
    torch.testing.assert_close(d_v, d_out)
    assert float(d_q.abs().max()) < 1e-12 and float(d_k.abs().max()) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("window", [None, 20])
def test_rounding_is_that_of_the_dtype(
    dtype: torch.dtype, bound: float, window: int | None
) -> None:
    row = random_row(5, 500)
    inputs = make_inputs(row, Shape(4, 2, 16), dtype)
    found = run(row, inputs, window, None, None)
    assert all(x.dtype == dtype for x in found)
    errors = relative_errors(found, reference(row, inputs, window, None, None))
    assert max(errors) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    row = random_row(6, 300)
    q, k, v, d_out = make_inputs(row, Shape(2, 2, 8), dtype)
    found = run(row, (q * 100, k * 100, v, d_out), 50, None, None)
    assert all(bool(x.isfinite().all()) for x in found)
    assert float(found[0].detach().abs().max()) <= float(v.abs().max()) * 1.01  # an average of v


def test_what_tree_rows_cannot_do_is_refused() -> None:
    row = random_row(0, 20)
    q, k, v, _ = make_inputs(row, Shape(2, 2, 4), torch.float32)
    module = torch.nn.Identity()
    with TreeLayout(row, q.device).active():
        for arguments, options in (
            ((q, k, v, torch.zeros(1, 1, q.shape[2], q.shape[2])), {}),
            ((q, k, v, None), {"dropout": 0.1}),
            ((q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), None), {}),
        ):
            with pytest.raises(RunFailedError, match="no mask, no attention dropout"):
                tree_attention_forward(module, *arguments, **options)


def test_the_innermost_layout_counts() -> None:
    outer, inner = random_row(1, 30), random_row(2, 60)
    assert len(outer.token_ids) != len(inner.token_ids)
    inputs = make_inputs(outer, Shape(2, 2, 4), torch.float64)
    expected = reference(outer, inputs, None, None, None)
    device = torch.device("cpu")
    q, k, v, _ = inputs
    with TreeLayout(outer, device).active():
        with pytest.raises(ZeroDivisionError), TreeLayout(inner, device).active():
            raise ZeroDivisionError
        out, _ = tree_attention_forward(torch.nn.Identity(), q, k, v, None)
    torch.testing.assert_close(out, expected[0])
    with pytest.raises(LookupError):
        tree_attention_forward(torch.nn.Identity(), q, k, v, None)


def test_the_model_gets_its_own_attention_back(make_model: Any) -> None:
    model = make_model("llama")
    before = model.config._attn_implementation
    with tree_attention(model.config):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
    with pytest.raises(ZeroDivisionError), tree_attention(model.config):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
