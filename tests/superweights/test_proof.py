"""The proof: planted super weights are proved, ordinary ones not; intervals and verdicts."""

import dataclasses
import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.superweights.ablate import text_loss, text_windows, zeroed
from swlora.superweights.meter import BlockLosses, Meter
from swlora.superweights.proof import prove, ratio_interval, verdict

# Where a single planted weight rules what the tiny model says, found at its first choice of layer
FAMILIES = ("llama", "gpt2", "gpt_neox", "phi3")
SETUP = {"n_controls": 6, "control_windows": 2, "seed": 3}


def sharp(model):
    """Make the model sure of what it says, so that other words than its own cost it much."""
    Anatomy(model).final_norm.weight.mul_(5)
    return model


def own_text(model, n: int = 3, n_tokens: int = 90) -> torch.Tensor:
    """Windows (n, T) of what the model itself writes: the text of which it is surest."""
    starts = torch.randint(0, 256, (n, 4), generator=torch.Generator().manual_seed(1))
    for _ in range(n_tokens - 4):
        starts = torch.cat([starts, model(input_ids=starts).logits[:, -1:].argmax(-1)], dim=1)
    return starts


def super_and_ordinary(model) -> list[WeightAddress]:
    mlp_out = Anatomy(model).family.mlp_out
    addresses = [WeightAddress(1, mlp_out, 5, 7), WeightAddress(2, mlp_out, 3, 2)]
    Anatomy(model).weight_view(addresses[0]).fill_(60.0)
    return addresses


def planted_proof(make_model, model_type="llama", **changes):
    model = sharp(make_model(model_type))
    addresses = super_and_ordinary(model)
    return model, addresses, prove(Meter(model, own_text(model)), addresses, **SETUP | changes)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_planted_super_weight_is_proved_and_nothing_else(model_type, make_model, weights_sha256):
    model = sharp(make_model(model_type))
    addresses = super_and_ordinary(model)
    before, windows = weights_sha256(model), own_text(model)
    proof = prove(Meter(model, windows), addresses, **SETUP)
    planted, ordinary = proof.addresses
    assert (planted.verdict, ordinary.verdict, proof.joint.verdict) == ("super", "none", "super")
    assert planted.weight == 60.0
    assert planted.effect_nats > 5 * planted.largest_control_effect > 0
    assert (ordinary.controls, ordinary.effect_nats) == ((), None)
    assert proof.joint_proven.addresses == (addresses[0],)
    assert proof.joint_proven.ratio == planted.ratio == ordinary.leave_one_out_ratio
    assert ordinary.ratio == planted.leave_one_out_ratio
    assert weights_sha256(model) == before


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_same_weights_unplanted_are_not(model_type, make_model):
    model = sharp(make_model(model_type))
    mlp_out = Anatomy(model).family.mlp_out
    addresses = [WeightAddress(1, mlp_out, 5, 7), WeightAddress(2, mlp_out, 3, 2)]
    proof = prove(Meter(model, own_text(model)), addresses, **SETUP)
    assert {p.verdict for p in proof.addresses} == {proof.joint.verdict} == {"none"}
    assert proof.joint_proven is None


def test_every_number_against_plain_passes(make_model):
    model, addresses, proof = planted_proof(make_model)
    windows = own_text(model)

    def perplexity(zero: list[WeightAddress], n: int = 3) -> float:
        if not zero:
            return text_loss(model, windows[:n]).perplexity
        with zeroed(Anatomy(model), zero):
            return text_loss(model, windows[:n]).perplexity

    base, near = perplexity([]), {"rel": 1e-5}
    assert proof.perplexity == pytest.approx(base, **near)
    for of_one, other in zip(proof.addresses, reversed(addresses), strict=True):
        assert of_one.perplexity == pytest.approx(perplexity([of_one.address]), **near)
        assert of_one.ratio == pytest.approx(of_one.perplexity / base, **near)
        assert of_one.leave_one_out_ratio == pytest.approx(perplexity([other]) / base, **near)
    assert proof.joint.perplexity == pytest.approx(perplexity(addresses), **near)
    assert proof.joint.addresses == tuple(addresses)
    planted, two = proof.addresses[0], perplexity([], 2)
    effects = [math.log(perplexity([c.address], 2) / two) for c in planted.controls]
    assert planted.control_effects_nats == pytest.approx(effects, abs=1e-5)
    assert planted.largest_control_effect == max(map(abs, planted.control_effects_nats))
    expected = math.log(perplexity([planted.address], 2) / two)
    assert planted.effect_nats == pytest.approx(expected, abs=1e-5)
    assert len(planted.controls) == len(proof.joint.control_effects_nats) == 6


def test_the_ratio_of_the_largest_control_is_one_that_a_control_has(make_model, monkeypatch):
    """Its effect counts by size; zeroing a control may make the text more likely."""
    controls = "swlora.superweights.proof._Judge._control_effects"
    monkeypatch.setattr(controls, lambda *_: (-0.2, 0.01))
    planted = planted_proof(make_model)[2].addresses[0]
    assert planted.largest_control == pytest.approx(math.exp(-0.2))
    assert (planted.largest_control_effect, planted.verdict) == (0.2, "super")


def test_weights_that_stand_in_for_one_another_are_super_only_together(make_model):
    """As in Phi-3: two inputs that are always equal, each with half of the weight."""
    model = sharp(make_model("llama"))
    mlp = model.model.layers[1].mlp
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight[8] = projection.weight[7]
    addresses = [WeightAddress(1, "mlp.down_proj", 5, k) for k in (7, 8)]
    for address in addresses:
        Anatomy(model).weight_view(address).fill_(60.0)
    proof = prove(Meter(model, own_text(model)), addresses, **SETUP)
    assert [p.verdict for p in proof.addresses] == ["none", "none"]
    assert proof.joint.verdict == "super"
    assert proof.joint.effect_nats > 5 * proof.joint.largest_control_effect > 0
    assert proof.joint_proven is None


def test_a_single_candidate(make_model):
    model = sharp(make_model("llama"))
    address = super_and_ordinary(model)[0]
    proof = prove(Meter(model, own_text(model)), [address], **SETUP)
    assert proof.addresses[0].leave_one_out_ratio == 1
    assert proof.joint.ratio == proof.addresses[0].ratio
    assert proof.joint.control_effects_nats == proof.addresses[0].control_effects_nats


def test_the_same_again_is_the_same_to_the_last_digit_and_strict_json(make_model):
    first, again = (planted_proof(make_model)[2] for _ in range(2))
    other = planted_proof(make_model, seed=4)[2]
    assert first == again
    assert first.addresses[0].controls != other.addresses[0].controls
    assert first.addresses[0].ratio == other.addresses[0].ratio
    read = json.loads(json.dumps(dataclasses.asdict(first), allow_nan=False))
    assert read["addresses"][0]["address"]["in_channel"] == 7
    assert (read["seed"], read["n_controls"], read["control_windows"]) == (3, 6, 2)
    assert (read["n_windows"], read["window_tokens"], read["block_tokens"]) == (3, 90, 64)


@pytest.mark.parametrize(
    ("ratio", "effect", "largest", "expected"),
    [
        (0.2, -1.6, 0.0, "none"),
        (1.5, 0.41, 0.0, "none"),
        (1.51, 0.41, 0.08, "strong"),
        (1.51, 0.41, 0.083, "none"),  # a control does a fifth of it
        (5.33, 1.67, 0.001, "strong"),  # although its ratio is only 5.33 times the controls'
        (10.0, 2.30, 0.001, "strong"),
        (10.1, 2.31, 0.001, "super"),
        (10.1, 2.31, 0.47, "none"),
        (1e304, 700.0, 0.5, "super"),
    ],
)
def test_verdicts(ratio, effect, largest, expected):
    assert verdict(ratio, effect, largest) == expected


def test_the_interval_of_two_blocks():
    """Rises 0 and 1: the mean of a draw is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4."""
    base, ablated = BlockLosses((64.0, 640.0), (64, 64)), BlockLosses((64.0, 704.0), (64, 64))
    assert ratio_interval(base, ablated, seed=0) == pytest.approx((1, math.e))


def test_the_interval_of_many_blocks_is_the_normal_one_of_the_mean():
    random = np.random.default_rng(5)
    rises = random.normal(0.5, 0.3, 400)
    base_nats = random.normal(3, 1, 400)  # spread of the text, which pairing takes out
    base = BlockLosses(tuple(64 * base_nats), (64,) * 400)
    ablated = BlockLosses(tuple(64 * (base_nats + rises)), (64,) * 400)
    low, high = ratio_interval(base, ablated, seed=0)
    half_width = 1.96 * rises.std() / 20
    assert math.log(low) == pytest.approx(rises.mean() - half_width, abs=0.1 * half_width)
    assert math.log(high) == pytest.approx(rises.mean() + half_width, abs=0.1 * half_width)
    assert (low, high) == ratio_interval(base, ablated, seed=0) != ratio_interval(base, ablated, 1)


def test_the_interval_weighs_blocks_by_their_tokens_and_holds_the_ratio(make_model):
    equal = BlockLosses((64.0, 5.0), (64, 5)), BlockLosses((96.0, 7.5), (64, 5))
    assert ratio_interval(*equal, seed=0) == pytest.approx((math.exp(0.5),) * 2)
    for of_one in planted_proof(make_model)[2].addresses:
        assert 0 < of_one.interval[0] < of_one.ratio < of_one.interval[1]


def test_progress_reaches_its_totals(make_model):
    shown: dict[str, list[float]] = {}
    notes: list[str] = []

    class Recording:
        @contextmanager
        def task(self, description, total=None):
            shown[description] = self.now = [0.0, total]
            yield self

        def advance(self, amount=1.0, note=""):
            self.now[0] += amount
            notes.append(note)

    planted_proof(make_model, progress=Recording())
    assert len(shown) == 4
    assert all(done == total for done, total in shown.values())
    assert "layer 1 mlp.down_proj [out 5, in 7] alone" in notes


def test_what_cannot_be_proved(make_model):
    model = make_model("llama")
    meter, address = (
        Meter(model, torch.zeros(2, 20).long()),
        WeightAddress(0, "mlp.down_proj", 0, 0),
    )
    for addresses in ([], [address, address]):
        with pytest.raises(UserError, match="needs candidates, each of them once"):
            prove(meter, addresses)
    for bad in ({"n_controls": 0}, {"control_windows": 0}, {"control_windows": 3}):
        with pytest.raises(UserError, match="one control at least, on 1 to 2 windows"):
            prove(meter, [address], **bad)
    with pytest.raises(UserError, match="outside the weight"):
        prove(meter, [address, WeightAddress(0, "mlp.down_proj", 24, 0)])
    with pytest.raises(UserError, match="layer 3 does not exist"):
        prove(meter, [WeightAddress(3, "mlp.down_proj", 0, 0)])


@pytest.mark.slow
def test_the_builtin_model(builtin_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(builtin_dir, dtype=torch.float32).eval()
    model.requires_grad_(False)
    windows = text_windows(AutoTokenizer.from_pretrained(builtin_dir), None, 2, 512)
    addresses = [
        WeightAddress(11, "mlp.down_proj", 507, 1229),
        WeightAddress(28, "mlp.down_proj", 507, 678),
        WeightAddress(29, "mlp.down_proj", 507, 1165),
    ]
    proof = prove(Meter(model, windows), addresses, n_controls=4)
    assert [p.verdict for p in proof.addresses] == ["strong", "none", "none"]
    assert proof.joint_proven.addresses == (addresses[0],)
