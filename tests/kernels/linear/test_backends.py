"""Every backend gives the products of F.linear; forwards read weights anew, and go again."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from swlora.kernels.linear.backends import (
    WITH_COPIES,
    WITHOUT_COPIES,
    backend_of,
    forwards_without_copies,
)
from swlora.kernels.patched_forwards import patched_forwards
from swlora.models.anatomy import weight_out_in


def made(weight: Tensor, bias: Tensor | None = None, is_transposed: bool = False) -> nn.Module:
    """A Conv1D (which has a bias always) where the weight (out, in) is stored transposed."""
    n_out, n_in = weight.shape
    module = Conv1D(n_out, n_in) if is_transposed else nn.Linear(n_in, n_out, bias is not None)
    module.weight.data = weight.t().contiguous() if is_transposed else weight
    if module.bias is not None:
        module.bias.data = torch.zeros_like(weight[:, 0]) if bias is None else bias
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_products(dtype, has_bias, shape, is_transposed):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(11, 7), torch.randn(11)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype) if has_bias else None
    module = made(weight, bias, is_transposed)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.inference_mode(), patched_forwards(forwards_without_copies(module)):
        assert ("forward" in vars(module)) == (dtype == torch.float32)
        y = module(x)
    assert y.dtype == dtype
    rel = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=rel, atol=rel)


def test_a_strided_input():
    x, weight = torch.randn(6, 9, 7)[:, ::2], torch.randn(11, 7)
    module = made(weight)
    with torch.inference_mode(), patched_forwards(forwards_without_copies(module)):
        torch.testing.assert_close(module(x), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon"])
def test_a_model_computes_the_same_also_after_a_weight_changed(model_type, make_model):
    model, ids = make_model(model_type), torch.arange(30)[None]
    for _ in range(2):
        expected = model(input_ids=ids).logits
        with torch.inference_mode(), patched_forwards(forwards_without_copies(model)):
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
    with pytest.raises(KeyboardInterrupt), patched_forwards(forwards_without_copies(model)):
        assert "forward" in model[0].__dict__ and "forward" not in model[1].__dict__
        raise KeyboardInterrupt
    assert "forward" not in model[0].__dict__


@pytest.mark.parametrize("table", [WITH_COPIES, WITHOUT_COPIES])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_backend_has_both_products(table, kind, dtype):
    """Also for inputs of another dtype than the weight had when the backend was chosen."""
    torch.manual_seed(0)
    module = (nn.Linear(7, 11) if kind is nn.Linear else Conv1D(11, 7)).requires_grad_(False)
    backend = backend_of(module, table)
    module.to(dtype)
    x, d_y = torch.randn(5, 7).to(dtype), torch.randn(5, 11).to(dtype)
    weight = weight_out_in(module)
    torch.testing.assert_close(backend.product(x, module.bias), F.linear(x, weight, module.bias))
    torch.testing.assert_close(backend.input_gradient(d_y), d_y @ weight)
