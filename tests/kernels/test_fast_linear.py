"""The other product gives the products of F.linear, reads weights anew, and goes when it should."""

import pytest
import torch
from torch.nn import functional as F

from swlora.kernels.fast_linear import fast_linears, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_products(dtype, has_bias, shape, is_transposed):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(11, 7), torch.randn(11)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype) if has_bias else None
    stored = weight.t().contiguous().t() if is_transposed else weight
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.inference_mode():
        y = linear(x, stored, bias)
    assert y.dtype == dtype
    rel = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=rel, atol=rel)


def test_a_strided_input():
    x, weight = torch.randn(6, 9, 7)[:, ::2], torch.randn(11, 7)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon"])
def test_a_model_computes_the_same_also_after_a_weight_changed(model_type, make_model):
    model, ids = make_model(model_type), torch.arange(30)[None]
    for _ in range(2):
        expected = model(input_ids=ids).logits
        with torch.inference_mode(), fast_linears(model):
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        next(model.parameters()).mul_(1.5)
        for module in model.modules():
            if type(module).__name__ in ("Linear", "Conv1D"):
                module.weight.mul_(1.1)
        assert not torch.allclose(model(input_ids=ids).logits, expected, rtol=1e-2)


def test_forwards_come_back_and_subclasses_keep_theirs():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), Doubled(3, 3))
    with pytest.raises(KeyboardInterrupt), fast_linears(model):
        assert "forward" in model[0].__dict__ and "forward" not in model[1].__dict__
        raise KeyboardInterrupt
    assert "forward" not in model[0].__dict__
