"""What backward makes again equals what was there, and nothing else is taken for it."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.labelled_loss import adapted
from torch import Tensor

from swlora.adapters.methods import trainable_parameters
from swlora.data.token_sequences import TokenSequences
from swlora.kernels import recomputed
from swlora.kernels.recomputed import made_by, recomputing
from swlora.training.step import TreeStep


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Count the bytes of all storages that the recipes' hooks hand to autograd."""
    counts: dict[str, int] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks

    def counting(pack: Any, unpack: Any) -> Any:
        def packed(x: Tensor) -> Any:
            kept = pack(x)
            if isinstance(kept[0], Tensor):
                storage = kept[0].untyped_storage()
                counts[str(storage.data_ptr())] = storage.nbytes()
            return kept

        return hooks(packed, unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recomputed.torch.autograd.graph, "saved_tensors_hooks", counting)
        yield counts


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_step_has_the_same_gradient_bit_for_bit_and_keeps_less(
    family, dtype, make_model, monkeypatch
):
    sequences = TokenSequences.from_lists([([1, 2, 3], [k, *range(5, 90)]) for k in (7, 8)])
    found, kept = [], []
    for is_on in (True, False):
        model = in_dtype(adapted(make_model, family), dtype)
        if not is_on:
            monkeypatch.setattr("swlora.kernels.fused.made_by", lambda result, _make: result)
        with counted_bytes() as counts:
            loss = TreeStep(model, sequences)([np.array([0, 1])])
        grads = {n: p.grad for n, p in trainable_parameters(model).items()}
        found.append((loss.sum_nats, grads))
        kept.append(sum(counts.values()))
    assert found[0][0] == found[1][0]
    for name, grad in found[0][1].items():
        assert grad is not None and bool(grad.any())
        assert torch.equal(grad, found[1][1][name]), name
    config, n_nodes = model.config, 3 + 2 * 85  # without the last token
    width = 2 * config.hidden_size + config.intermediate_size
    assert kept[1] - kept[0] == config.num_hidden_layers * n_nodes * width * dtype.itemsize


def gradient(body: Any) -> Tensor:
    x = torch.linspace(-2, 2, 40).requires_grad_()
    with recomputing():
        y = body(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    return grad


def test_a_recipe_is_read_by_every_reader_and_let_go():
    n_made = 0

    def body(x: Tensor) -> Tensor:
        def make() -> Tensor:
            nonlocal n_made
            n_made += 1
            return x.detach().exp()

        y = made_by(x.exp(), make)
        return y.pow(2) + y.view(8, 5).pow(3).view(-1)

    x = torch.linspace(-2, 2, 40)
    torch.testing.assert_close(gradient(body), 2 * (2 * x).exp() + 3 * (3 * x).exp())
    assert n_made == 1


def test_a_recipe_that_nobody_kept_lets_go_of_what_it_is_made_from():
    x = torch.zeros(40)
    with recomputing():
        source = x + 1
        held = weakref.ref(source)
        made_by(source.exp(), source.exp)
        del source
        assert held() is None


def test_memory_that_is_used_again_is_not_taken_for_the_result():
    def body(x: Tensor) -> Tensor:
        y = made_by(x.detach() + 1, lambda: pytest.fail("the result is gone"))
        address = y.data_ptr()
        del y
        for _ in range(100):  # the allocator hands the same memory out again
            z = x * 3
            if z.data_ptr() == address:
                break
        return z.pow(2)

    torch.testing.assert_close(gradient(body), 18 * torch.linspace(-2, 2, 40))


def test_a_result_that_was_changed_is_kept_as_it_is():
    def body(x: Tensor) -> Tensor:
        y = made_by(x * 3, lambda: pytest.fail("the result was changed"))
        return y.add_(1).pow(2)

    torch.testing.assert_close(gradient(body), 6 * (3 * torch.linspace(-2, 2, 40) + 1))


def test_what_is_changed_after_it_was_kept_is_an_error():
    def body(x: Tensor) -> Tensor:
        y = x.exp()  # keeps its result
        return y.add_(1)

    with pytest.raises(RuntimeError, match="changed in place"):
        gradient(body)


def test_nothing_changes_outside():
    x = torch.ones(3, requires_grad=True)
    y = made_by(x.exp(), lambda: pytest.fail("never made"))
    torch.testing.assert_close(torch.autograd.grad(y.pow(2).sum(), x)[0], 2 * (2 * x).exp())
