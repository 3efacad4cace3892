"""Weights that stay in their blocks: computed with as if dequantised, and not written to."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from swlora.errors import UserError
from swlora.models.gguf_blocks import StoredMatrix
from swlora.models.quantised_weight import QuantisedWeight, has_quantised, is_quantised

DTYPE = torch.bfloat16


@pytest.fixture
def matrix():
    numbers = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    blocks = torch.from_numpy(gguf.quantize(numbers, Kind.Q5_1))
    return StoredMatrix(blocks, Kind.Q5_1, 64, torch.randperm(48))


def linear(weight):
    module = nn.Linear(64, 48, bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


@pytest.fixture
def counted(monkeypatch):
    """How often a whole matrix was dequantised."""
    calls, dense = [], StoredMatrix.dense
    monkeypatch.setattr(StoredMatrix, "dense", lambda *a: calls.append(1) or dense(*a))
    return calls


def test_a_linear_map_and_its_gradient(matrix, counted):
    module, plain = linear(QuantisedWeight(matrix, DTYPE)), linear(matrix.dense(DTYPE))
    counted.clear()
    assert is_quantised(module) and has_quantised(nn.Sequential(module))
    assert not is_quantised(plain) and not has_quantised(plain)
    assert module.weight.shape == (48, 64)
    assert module.weight.dtype == DTYPE
    assert "Q5_1" in repr(module.weight)
    x = torch.randn(2, 5, 64, dtype=DTYPE, requires_grad=True)
    y = module(x)
    assert len(counted) == 1
    saved = [t for t in y.grad_fn.next_functions if hasattr(t[0], "_saved_mat2")]
    assert all(isinstance(t[0]._saved_mat2, QuantisedWeight) for t in saved)
    (d_x,) = torch.autograd.grad(y.square().sum(), x)
    assert len(counted) == 2
    expected = plain(x)
    (d_expected,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(y, expected)
    assert torch.equal(d_x, d_expected)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_in_inference_mode(matrix, is_transposed):
    weight = nn.Parameter(QuantisedWeight(matrix, DTYPE, is_transposed=is_transposed), False)
    dense = weight.detach().dense()
    with torch.inference_mode():
        assert torch.equal(weight.detach().dense(), dense)
        assert torch.equal(weight.t().dense(), dense.t())
        assert torch.equal(weight.float().dense().to(DTYPE), dense)
        x = torch.randn(3, dense.shape[1], dtype=DTYPE)
        assert torch.equal(F.linear(x, weight), F.linear(x, dense))
    assert torch.equal(weight.detach().dense(), dense)


def test_nothing_dense_is_saved_for_the_backward_pass(matrix, counted):
    weight = QuantisedWeight(matrix, DTYPE)
    kept = []
    x = torch.randn(3, 64, dtype=DTYPE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(weight)(x)
    assert kept
    assert all(isinstance(t, QuantisedWeight) or t.shape == x.shape for t in kept)


def test_rows_of_an_embedding_without_the_others(matrix, counted):
    dense = matrix.dense(DTYPE)
    counted.clear()
    module = nn.Embedding(48, 64, padding_idx=3, device="meta")
    module.weight = nn.Parameter(QuantisedWeight(matrix, DTYPE), requires_grad=False)
    ids = torch.tensor([[3, 47, 0], [9, 9, 3]])
    assert torch.equal(module(ids), dense[ids])
    assert torch.equal(module.weight[ids[0]], dense[ids[0]])
    assert not counted


def test_gpt2s_transposed_map(matrix):
    module = Conv1D(48, 64)
    module.weight = nn.Parameter(QuantisedWeight(matrix, DTYPE, is_transposed=True), False)
    module.bias = nn.Parameter(torch.randn(48, dtype=DTYPE))
    x = torch.randn(5, 64, dtype=DTYPE)
    assert module.weight.shape == (64, 48)
    expected = torch.addmm(module.bias, x, matrix.dense(DTYPE).t())
    assert torch.equal(module(x), expected)
    assert isinstance(module.weight.detach().t(), QuantisedWeight)
    assert torch.equal(module.weight.t().dense(), matrix.dense(DTYPE))


def test_another_dtype(matrix):
    weight = nn.Parameter(QuantisedWeight(matrix, torch.float32), requires_grad=False)
    weight.data = weight.data.to(DTYPE)
    assert isinstance(weight, QuantisedWeight) and weight.dtype == DTYPE
    x = torch.randn(3, 64, dtype=DTYPE)
    assert torch.equal(F.linear(x, weight), F.linear(x, matrix.dense(DTYPE)))
    assert type(weight.to(torch.int32)) is torch.Tensor


def test_writing_is_refused(matrix):
    weight = nn.Parameter(QuantisedWeight(matrix, DTYPE), requires_grad=False)
    for write in (
        lambda: weight.data.add_(1),
        lambda: weight.data.copy_(torch.zeros(48, 64)),
        lambda: weight.data.zero_(),
        lambda: weight.data[0, 0].zero_(),
        lambda: weight.data.__setitem__((0, 0), 1.0),
        lambda: weight.data[:5].zero_(),
        lambda: weight.data.narrow(0, 1, 2).zero_(),
        lambda: weight.data.diagonal().zero_(),
        lambda: weight.data.view(-1).zero_(),
        lambda: torch.add(torch.ones(48, 64), 1, out=weight.data),
    ):
        with pytest.raises(UserError, match="--frozen dequantised"):
            write()
    assert torch.equal(weight.dense(), matrix.dense(DTYPE))
    assert torch.equal(torch.add(weight, 1), matrix.dense(DTYPE) + 1)
