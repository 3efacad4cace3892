"""Controls: of the same matrix, of nearly the same magnitude, never a candidate, never twice."""

import math

import pytest
import torch

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress, weight_out_in
from swlora.superweights.controls import draw_controls

MLP_OUT = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "mixtral": "mlp.experts.3.down_proj"}
each_type = pytest.mark.parametrize("model_type", list(MLP_OUT))
N = 6


@each_type
@pytest.mark.parametrize("value", [50.0, -50.0, 0.1, 0.0])
def test_controls_are_among_the_thirty_nearest_in_magnitude(model_type, value, make_model):
    anatomy = Anatomy(make_model(model_type))
    address = WeightAddress(1, MLP_OUT[model_type], 17, 33)
    matrix = weight_out_in(anatomy.projection(1, address.module))
    matrix[17, 33] = value
    n_out, n_in = matrix.shape
    assert n_out != n_in
    gaps = {
        (j, k): abs(abs(float(matrix[j, k])) - abs(float(matrix[17, 33])))
        for j in range(n_out)
        for k in range(n_in)
        if (j, k) != (17, 33)
    }
    nearest = set(sorted(gaps, key=lambda place: gaps[place])[: 5 * N])
    drawn = set()
    for seed in range(40):
        controls = draw_controls(anatomy, [address], N, seed)[address]
        places = {(c.address.out_channel, c.address.in_channel) for c in controls}
        assert len(places) == N
        assert places <= nearest
        for c in controls:
            assert (c.address.layer, c.address.module) == (1, address.module)
            assert c.weight == anatomy.weight_view(c.address) != value
        drawn |= places
    assert drawn == nearest  # all of them, not the nearest few


def test_weights_of_equal_distance_have_equal_chances(make_model):
    """Quantised matrices have few values; a sort alone would take its ties from one corner."""
    anatomy = Anatomy(make_model("llama"))
    address = WeightAddress(0, "mlp.down_proj", 3, 4)
    matrix = weight_out_in(anatomy.projection(0, address.module))
    matrix.copy_(torch.where(matrix > 0, 0.25, -0.25))
    rows = set()
    for seed in range(30):
        controls = draw_controls(anatomy, [address], 20, seed)[address]
        rows |= {c.address.out_channel for c in controls}
    assert rows == set(range(24))


def test_candidates_of_one_matrix_are_no_controls_and_share_none(make_model):
    anatomy = Anatomy(make_model("gpt2"))
    addresses = [WeightAddress(2, "mlp.c_proj", j, 7) for j in (1, 5, 9)]
    for address in addresses:
        anatomy.weight_view(address).fill_(9.0)
    far = WeightAddress(1, "mlp.c_proj", 1, 7)
    for seed in range(20):
        controls = draw_controls(anatomy, [*addresses, far], 20, seed)
        drawn = [c.address for of_one in controls.values() for c in of_one]
        assert not set(drawn) & {*addresses, far}
        assert len(set(drawn)) == len(drawn) == 80
        assert {c.address.layer for c in controls[far]} == {1}


def test_the_seed_decides(make_model):
    anatomy = Anatomy(make_model("llama"))
    addresses = [WeightAddress(1, "mlp.down_proj", 17, 33), WeightAddress(1, "mlp.down_proj", 2, 3)]
    first = draw_controls(anatomy, addresses, N, 7)
    assert first == draw_controls(Anatomy(make_model("llama")), addresses, N, 7)
    assert first != draw_controls(anatomy, addresses, N, 8)


def test_a_matrix_without_enough_others(make_model):
    anatomy = Anatomy(make_model("llama"))
    address = WeightAddress(1, "mlp.down_proj", 17, 33)
    matrix = weight_out_in(anatomy.projection(1, address.module))
    assert len(draw_controls(anatomy, [address], 24 * 40 - 1, 0)[address]) == 24 * 40 - 1
    with pytest.raises(UserError, match=r"layer 1 .* too small for 960 controls"):
        draw_controls(anatomy, [address], 24 * 40, 0)
    matrix[:12] = math.nan  # such weights are no controls
    address = WeightAddress(1, "mlp.down_proj", 18, 33)
    controls = draw_controls(anatomy, [address], 12 * 40 - 1, 0)[address]
    assert all(math.isfinite(c.weight) for c in controls)
