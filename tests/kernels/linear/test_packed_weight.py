"""Weights in the kernels' layout against the weights themselves."""

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from swlora import memory
from swlora.kernels.linear import packed_weight as module
from swlora.kernels.linear.backends import WITH_COPIES, PackedProducts, select_fast
from swlora.kernels.linear.packed_weight import PackedWeight, held_bytes, linear
from swlora.models.anatomy import weight_out_in

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


def packed_weight(modules: Sequence[nn.Module], *, transposed: bool = False) -> PackedWeight:
    """The shared copy, for which there is room."""
    packed = module.packed_weight(modules, transposed=transposed)
    assert packed is not None
    return packed


def make(kind: type, out: int = 11, n_in: int = 7, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Linear(n_in, out) if kind is nn.Linear else Conv1D(out, n_in)
    return made.requires_grad_(False)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("n_rows", [1, 2, 37])
def test_both_products(kind, n_rows):
    one = make(kind)
    weight, x = weight_out_in(one), torch.randn(n_rows, 7)
    torch.testing.assert_close(linear(x, packed_weight([one]).tensor()), x @ weight.t())
    with_bias = linear(x, packed_weight([one]).tensor(), one.bias)
    torch.testing.assert_close(with_bias, one(x))
    d_y = torch.randn(11, n_rows).t()  # not contiguous
    back = packed_weight([one], transposed=True)
    torch.testing.assert_close(linear(d_y, back.tensor()), d_y @ weight)


def test_stacked_weights_are_one_product():
    two, x = [make(nn.Linear, 11), make(nn.Linear, 4, seed=1)], torch.randn(3, 7)
    stacked = linear(x, packed_weight(two).tensor())
    expected = torch.cat([x @ m.weight.t() for m in two], dim=1)
    torch.testing.assert_close(stacked, expected)
    both, first = packed_weight(two), packed_weight(two[:1])
    assert both is not first


def test_a_copy_is_shared_until_its_weight_changes():
    one, x = make(nn.Linear), torch.eye(7)
    held = packed_weight([one])
    first = held.tensor()
    assert packed_weight([one]).tensor() is first
    one.weight[3, 2] = 5.0  # in place: seen by `of` at once
    assert packed_weight([one]).tensor() is not first
    assert linear(x, packed_weight([one]).tensor())[2, 3] == 5.0
    one.weight.data.mul_(2)  # no trace on the tensor: seen by whoever asks anew
    assert linear(x, packed_weight([one]).tensor())[2, 3] == 10.0
    one.weight.data = torch.ones(11, 7)
    assert torch.equal(linear(x, packed_weight([one]).tensor()), torch.ones(7, 11))


def test_what_the_kernels_take():
    one, other = make(nn.Linear), make(Conv1D)
    assert select_fast([one, nn.LayerNorm(7), other], WITH_COPIES) == [one, other]
    assert not PackedProducts.takes(make(nn.Linear).double())
    mixed = make(nn.Linear)
    mixed.bias.data = mixed.bias.data.bfloat16()
    assert not PackedProducts.takes(mixed)

    class Other(nn.Linear):
        """It may compute something else."""

    assert not PackedProducts.takes(Other(7, 11))


def limit_to(n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave room for so many bytes beside what is held already."""
    gc.collect()
    monkeypatch.setattr(memory, "_asked_bytes", held_bytes() + n_bytes)


def test_the_limit_holds_for_all_copies_together(monkeypatch):
    one, other = make(nn.Linear), make(Conv1D)
    n_bytes = one.weight.nbytes
    limit_to(2 * n_bytes, monkeypatch)
    first, second = PackedProducts([one]), PackedProducts([other])
    assert first.reserve() and second.reserve()
    again = PackedProducts([one])
    assert again.reserve()  # a shared copy is counted once
    assert not PackedProducts([one, other]).reserve()
    del first, again
    assert PackedProducts([other]).reserve(backward=True)  # the room of the first
    del second
    first, second = PackedProducts([one]), PackedProducts([other])
    assert first.reserve(backward=True) and not second.reserve()
    limit_to(n_bytes - 1, monkeypatch)
    assert not PackedProducts([make(nn.Linear)]).reserve()


def test_without_room_the_weights_themselves_are_used(monkeypatch):
    one, x, d_y = make(nn.Linear), torch.randn(3, 7), torch.randn(3, 11)
    limit_to(one.weight.nbytes, monkeypatch)
    products, n_before = PackedProducts([one]), held_bytes()
    torch.testing.assert_close(products.product(x, one.bias), one(x))
    torch.testing.assert_close(products.input_gradient(d_y), d_y @ one.weight)
    assert held_bytes() - n_before == one.weight.nbytes
    copy = packed_weight([one])
    del products
    assert held_bytes() - n_before == one.weight.nbytes
    del copy
    assert held_bytes() == n_before


def test_a_copy_follows_its_weight_to_another_size():
    one = make(nn.Linear)
    copy, n_before = packed_weight([one]), held_bytes()
    one.weight.data = one.weight.data.bfloat16()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        copy.tensor()
        assert n_before - held_bytes() == one.weight.nbytes
