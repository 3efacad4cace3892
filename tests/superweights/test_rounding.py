"""Rounding to nearest: the plain formula, one number at a time; the model is given back whole."""

import math
from typing import Any, get_args

import pytest
import torch

from swlora.models.anatomy import Anatomy, WeightAddress, weight_out_in
from swlora.progress import Silent
from swlora.superweights import rounding
from swlora.superweights.ablate import text_loss
from swlora.superweights.meter import Meter
from swlora.superweights.rounding import Group, measure_rounding, rounded, rounded_model

WINDOWS = torch.randint(0, 250, (2, 30), generator=torch.Generator().manual_seed(3))
GROUPS = get_args(Group)


def by_hand(
    weight: list[list[float]], bits: int, group: str, held: set[tuple[int, int]], block: int
) -> list[list[float]]:
    """Every weight against the smallest and largest of its group, in float64."""
    n_out, n_in = len(weight), len(weight[0])

    def same_group(j: int, k: int) -> list[tuple[int, int]]:
        rows = range(n_out) if group == "tensor" else [j]
        first = k // block * block if group == "block" else 0
        columns = range(first, min(first + block, n_in)) if group == "block" else range(n_in)
        return [(a, b) for a in rows for b in columns]

    result = [list(row) for row in weight]
    for j in range(n_out):
        for k in range(n_in):
            others = [weight[a][b] for a, b in same_group(j, k) if (a, b) not in held]
            if (j, k) in held or max(others) == min(others):
                continue
            step = (max(others) - min(others)) / (2**bits - 1)
            result[j][k] = round((weight[j][k] - min(others)) / step) * step + min(others)
    return result


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("held", [set(), {(1, 4)}, {(0, 0), (2, 6)}])
def test_rounded_is_the_plain_formula(bits, group, held, monkeypatch):
    monkeypatch.setattr(rounding, "BLOCK_WEIGHTS", 3)  # of 7: the last block has one weight
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(bits))
    weight[1, 4], weight[3] = 50.0, 0.25  # an outlier, and a row of equal weights
    kept = weight.clone()
    found = rounded(weight, bits, group, held)
    assert torch.equal(weight, kept)
    expected = torch.tensor(by_hand(weight.double().tolist(), bits, group, held, 3))
    assert torch.allclose(found, expected.float(), rtol=1e-5, atol=1e-5)
    for place in held:
        assert found[place] == weight[place]


def test_an_outlier_that_is_held_out_makes_the_steps_of_its_group_finer():
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    weight[2, 5] = 300.0
    others = torch.ones_like(weight, dtype=torch.bool)
    others[2, 5] = False
    for group, share in (("tensor", 0.9), ("channel", 0.2), ("block", 0.1)):
        errors = [
            (rounded(weight, 4, group, held) - weight)[others].abs().sum()
            for held in ((), ((2, 5),))
        ]
        assert errors[1] < (1 - share) * errors[0], group


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_rounded_model_is_every_projection_rounded(model_type, group, make_model, weights_sha256):
    model, other = make_model(model_type), make_model(model_type)
    anatomy, before = Anatomy(model), weights_sha256(model)
    address = WeightAddress(1, "mlp.experts.2.down_proj", 3, 20)
    if model_type != "mixtral":
        address = WeightAddress(1, anatomy.family.mlp_out, 3, 20)
    rest = {name for name, _ in model.named_parameters()}
    plain = Anatomy(other)
    names = [(p.layer, p.name) for p in plain.all_projections()]
    if model_type == "mixtral":
        parts = ("gate_up_proj", "down_proj")
        names += [(n, f"mlp.experts.{e}.{p}") for n in range(3) for e in range(5) for p in parts]
    for layer, name in names:
        weight = weight_out_in(plain.projection(layer, name))
        held = [(3, 20)] if (layer, name) == (1, address.module) else []
        weight.copy_(rounded(weight.clone(), 4, group, held))
    with rounded_model(anatomy, 4, group, [address]):
        changed = weights_sha256(model)
        assert changed == weights_sha256(other) != before
        assert float(anatomy.weight_view(address)) == float(
            Anatomy(make_model(model_type)).weight_view(address)
        )
    assert weights_sha256(model) == before
    assert rest == {name for name, _ in model.named_parameters()}


def test_ratios_are_those_of_rounded_models(make_model, weights_sha256):
    model = make_model("llama")
    address = WeightAddress(1, "mlp.down_proj", 5, 7)
    Anatomy(model).weight_view(address).fill_(60.0)
    before, base = weights_sha256(model), text_loss(model, WINDOWS).nats_per_token
    found = measure_rounding(Meter(model, WINDOWS), [address], Silent())
    assert weights_sha256(model) == before
    assert [(r.bits, r.group) for r in found] == [(b, g) for b in (8, 4) for g in GROUPS]
    for r in found:
        for ratio, held in ((r.ratio, []), (r.ratio_held, [address])):
            with rounded_model(Anatomy(model), r.bits, r.group, held):
                nats = text_loss(model, WINDOWS).nats_per_token
            assert ratio == pytest.approx(math.exp(nats - base), rel=2e-5)
    assert all(r.ratio != r.ratio_held for r in found if r.bits == 4)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 9])  # while weights are rounded, the first and a later one
def test_the_model_is_whole_after_an_error(call, error, make_model, monkeypatch, weights_sha256):
    model = make_model("llama")
    before, calls, real = weights_sha256(model), [], rounding.rounded

    def fails(*args: Any) -> torch.Tensor:
        calls.append(weights_sha256(model))
        if len(calls) == call:
            raise error
        return real(*args)

    monkeypatch.setattr(rounding, "rounded", fails)
    with pytest.raises(error), rounded_model(Anatomy(model), 4, "channel"):
        pass
    assert len(calls) == call
    assert (calls[-1] != before) == (call > 1)
    assert weights_sha256(model) == before


def test_the_model_is_whole_after_an_error_in_the_body(make_model, weights_sha256):
    model = make_model("mixtral")
    before = weights_sha256(model)
    with pytest.raises(ZeroDivisionError), rounded_model(Anatomy(model), 4, "tensor"):
        assert weights_sha256(model) != before
        raise ZeroDivisionError
    assert weights_sha256(model) == before
