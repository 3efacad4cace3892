"""A mean in place of a weight's product: as hooks and biases of plain models do it by hand."""

import math
from typing import Any

import pytest
import torch

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.superweights.ablate import text_loss, zeroed
from swlora.superweights.mean_product import (
    large_ones,
    means_of_others,
    restore_mean,
    weight_products,
)
from swlora.superweights.meter import Meter

WINDOWS = torch.randint(0, 250, (3, 21), generator=torch.Generator().manual_seed(9))
# First layer, last layer, Conv1D, attention: every way in which a module may be found
PLACES = [
    ("llama", WeightAddress(0, "mlp.down_proj", 5, 7)),
    ("llama", WeightAddress(2, "self_attn.o_proj", 20, 3)),
    ("gpt2", WeightAddress(1, "mlp.c_proj", 17, 39)),
    ("falcon", WeightAddress(1, "mlp.dense_4h_to_h", 2, 11)),
]


def planted(make_model: Any, model_type: str, address: WeightAddress) -> Any:
    model = make_model(model_type)
    Anatomy(model).weight_view(address).fill_(9.0)
    return model


def inputs_by_hand(model: Any, address: WeightAddress, window: torch.Tensor) -> list[float]:
    """What goes into the weight's input channel at every position of a window."""
    seen: list[torch.Tensor] = []
    module = Anatomy(model).projection(address.layer, address.module)
    handle = module.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    text_loss(model, window[None])
    handle.remove()
    return seen[0].reshape(len(window), -1)[:, address.in_channel].tolist()


def nats_by_hand(model: Any, address: WeightAddress, constants: list[list[float]]) -> float:
    """The mean loss with the weight at zero and these numbers added to its channel."""
    anatomy, total = Anatomy(model), 0.0
    module = anatomy.projection(address.layer, address.module)
    with zeroed(anatomy, [address]):
        for window, added in zip(WINDOWS, constants, strict=True):

            def add(_module: Any, _x: Any, y: torch.Tensor, added: Any = added) -> torch.Tensor:
                y = y.clone()
                rows = y.view(len(added), -1)
                rows[:, address.out_channel] += torch.tensor(added)
                return y

            handle = module.register_forward_hook(add)
            total += text_loss(model, window[None]).sum_nats
            handle.remove()
    return total / (len(WINDOWS) * (WINDOWS.shape[1] - 1))


@pytest.mark.parametrize(("model_type", "address"), PLACES)
def test_ratios_are_those_of_hooks_by_hand(model_type, address, make_model, weights_sha256):
    model = planted(make_model, model_type, address)
    before = weights_sha256(model)
    found = restore_mean(Meter(model, WINDOWS), address)
    assert weights_sha256(model) == before
    assert not any(module._forward_hooks for module in model.modules())
    products = [[9 * x for x in inputs_by_hand(model, address, w)] for w in WINDOWS]
    most = max(abs(p) for row in products for p in row)
    kinds = {
        "everywhere": [[True] * 21] * 3,
        "by_size": [[abs(p) >= most / 2 for p in row] for row in products],
    }
    base = text_loss(model, WINDOWS).nats_per_token
    for name, is_large in kinds.items():
        constants: list[list[float]] = []
        for w in range(3):
            row = []
            for t in range(21):
                others = [
                    products[v][s]
                    for v in range(3)
                    for s in range(21)
                    if v != w and is_large[v][s] == is_large[w][t]
                ]
                row.append(sum(others) / len(others) if others else 0.0)
            constants.append(row)
        ratio = math.exp(nats_by_hand(model, address, constants) - base)
        assert getattr(found, f"ratio_{name}") == pytest.approx(ratio, rel=2e-5), name
        assert abs(ratio - 1) > 1e-4, "a model that nothing changes shows nothing"
    large = [p for row in products for p in row if abs(p) >= most / 2]
    assert (found.n_large, found.n_positions) == (len(large), 63)
    assert found.mean_large == pytest.approx(sum(large) / len(large), rel=1e-4)
    assert found.mean == pytest.approx(sum(map(sum, products)) / 63, rel=1e-4, abs=1e-5)


def test_a_constant_everywhere_is_a_bias(make_model):
    """GPT-2's projections have one: another way to the same model, without any hook."""
    address = WeightAddress(1, "mlp.c_proj", 17, 39)
    model = planted(make_model, "gpt2", address)
    windows = WINDOWS[:1].repeat(3, 1)  # the other windows' mean is the same for all three
    found = restore_mean(Meter(model, windows), address)
    base = text_loss(model, windows).nats_per_token
    Anatomy(model).weight_view(address).zero_()
    Anatomy(model).projection(1, "mlp.c_proj").bias[17] += found.mean
    ratio = math.exp(text_loss(model, windows).nats_per_token - base)
    assert found.ratio_everywhere == pytest.approx(ratio, rel=2e-5)


def test_an_expert_puts_out_what_its_router_lets_it(make_model):
    """With the products themselves as constants the model is the intact one."""
    model = make_model("mixtral")
    anatomy, address = Anatomy(model), WeightAddress(1, "mlp.experts.3.down_proj", 5, 7)
    anatomy.weight_view(address).fill_(9.0)
    products = weight_products(anatomy, WINDOWS, address)
    assert 0 < int((products != 0).sum()) < products.numel(), "some tokens go to other experts"
    experts, base = anatomy.experts(1), text_loss(model, WINDOWS).nats_per_token
    rows = iter(products)

    def add(_module: Any, _x: Any, y: torch.Tensor) -> torch.Tensor:
        return y.index_add(1, torch.tensor([5]), next(rows)[:, None].to(y))

    handle = experts.register_forward_hook(add)
    with zeroed(anatomy, [address]):
        again = text_loss(model, WINDOWS).nats_per_token
        handle.remove()
        without = text_loss(model, WINDOWS).nats_per_token
    assert again == pytest.approx(base, abs=1e-6)
    assert abs(without - base) > 1e-3
    assert restore_mean(Meter(model, WINDOWS), address).n_positions == 63


def test_means_leave_their_own_window_out():
    products = torch.tensor([[8.0, 1.0, -1.0], [6.0, 2.0, 0.0]], dtype=torch.float64)
    large = large_ones(products)
    assert large.tolist() == [[True, False, False], [True, False, False]]
    assert means_of_others(products, large).tolist() == [[6, 1, 1], [8, 0, 0]]
    alone = torch.tensor([[8.0, 1.0, -1.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    assert means_of_others(alone, large_ones(alone)).tolist() == [[0, 2, 2], [0, 0, 0]]


def test_one_window_has_no_others(make_model):
    model = make_model("llama")
    with pytest.raises(UserError, match="--windows 2"):
        restore_mean(Meter(model, WINDOWS[:1]), WeightAddress(0, "mlp.down_proj", 5, 7))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_whole_after_an_error(error, make_model, monkeypatch, weights_sha256):
    address = WeightAddress(1, "mlp.down_proj", 5, 7)
    model = planted(make_model, "llama", address)
    before, meter, states = weights_sha256(model), Meter(model, WINDOWS), []

    def fails(*_: Any) -> Any:
        states.append(
            (weights_sha256(model), len(model.model.layers[1].mlp.down_proj._forward_hooks))
        )
        raise error

    meter.measure({})
    monkeypatch.setattr(Meter, "_run", fails)
    with pytest.raises(error):
        restore_mean(meter, address)
    assert states[0][0] != before and states[0][1] == 1, "it failed while the weight was zero"
    assert weights_sha256(model) == before
    assert not any(module._forward_hooks for module in model.modules())
