"""Weights in the kernels' layout against the weights themselves."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from swlora.kernels import packed_weight as module
from swlora.kernels.packed_weight import is_packable, linear, packable, packed_weight
from swlora.models.anatomy import weight_out_in

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


def make(kind: type, out: int = 11, n_in: int = 7, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Linear(n_in, out) if kind is nn.Linear else Conv1D(out, n_in)
    return made.requires_grad_(False)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("n_rows", [1, 2, 37])
def test_both_products(kind, n_rows):
    one = make(kind)
    weight, x = weight_out_in(one), torch.randn(n_rows, 7)
    torch.testing.assert_close(linear(x, packed_weight([one]).of([one])), x @ weight.t())
    with_bias = linear(x, packed_weight([one]).of([one]), one.bias)
    torch.testing.assert_close(with_bias, one(x))
    d_y = torch.randn(11, n_rows).t()  # not contiguous
    back = packed_weight([one], transposed=True)
    torch.testing.assert_close(linear(d_y, back.of([one])), d_y @ weight)


def test_stacked_weights_are_one_product():
    two, x = [make(nn.Linear, 11), make(nn.Linear, 4, seed=1)], torch.randn(3, 7)
    stacked = linear(x, packed_weight(two).of(two))
    expected = torch.cat([x @ m.weight.t() for m in two], dim=1)
    torch.testing.assert_close(stacked, expected)
    assert packed_weight(two) is not packed_weight(two[:1])


def test_a_copy_is_shared_until_its_weight_changes():
    one, x = make(nn.Linear), torch.eye(7)
    first = packed_weight([one]).of([one])
    assert packed_weight([one]).of([one]) is first
    one.weight[3, 2] = 5.0  # in place: seen by `of` at once
    assert packed_weight([one]).of([one]) is not first
    assert linear(x, packed_weight([one]).of([one]))[2, 3] == 5.0
    one.weight.data.mul_(2)  # no trace on the tensor: seen by whoever asks anew
    assert linear(x, packed_weight([one]).of([one]))[2, 3] == 10.0
    one.weight.data = torch.ones(11, 7)
    assert torch.equal(linear(x, packed_weight([one]).of([one])), torch.ones(7, 11))


def test_what_the_kernels_take(monkeypatch):
    one, other = make(nn.Linear), make(Conv1D)
    assert packable([one, nn.LayerNorm(7), other]) == {one, other}
    assert not is_packable(make(nn.Linear).double())
    mixed = make(nn.Linear)
    mixed.bias.data = mixed.bias.data.bfloat16()
    assert not is_packable(mixed)

    class Other(nn.Linear):
        """It may compute something else."""

    assert not is_packable(Other(7, 11))
    n_bytes = sum(p.nbytes for p in one.parameters())
    monkeypatch.setattr(module, "PACK_LIMIT_BYTES", 2 * n_bytes)
    assert packable([one, other]) == {one, other}
    assert packable([one, other], copies=2) == {one}
    monkeypatch.setattr(module, "PACK_LIMIT_BYTES", n_bytes - 1)
    assert packable([one, other]) == set()
