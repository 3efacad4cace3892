"""Adapters: where they sit, what they train, and that the frozen model stays what it was."""

import warnings

import pytest
import torch
from tests.support.adapters import attach
from torch.nn import functional as F

from swlora.adapters.methods import (
    adapted_layers,
    adapted_modules,
    resolve_targets,
    train_mode,
    trainable_parameters,
)
from swlora.config import AdapterSpec
from swlora.errors import UserError
from swlora.models.anatomy import FAMILIES, Anatomy, weight_out_in

MODEL_TYPES = sorted(t for family in FAMILIES for t in family.model_types)
TOKENS = torch.tensor([[72, 105, 33, 10, 200]])


def spec(**changes) -> AdapterSpec:
    return AdapterSpec(**{"rank": 3, "alpha": 6.0} | changes)


def inner_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


# Where


@pytest.mark.parametrize("layers", [[0, 1, 2], [1], [0, 2]])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_chosen_layers_and_no_others(model_type, layers, make_model):
    model = make_model(model_type)
    expected = {
        p.full_name: p.module for p in Anatomy(model).all_projections() if p.layer in layers
    }
    shapes = {
        f"{name}.lora_{part}.default.weight": (3, n_in) if part == "A" else (n_out, 3)
        for name, module in expected.items()
        for n_out, n_in in [tuple(weight_out_in(module).shape)]
        for part in "AB"
    }
    peft_model = attach(model, spec(), layers, seed=0)
    adapted = adapted_modules(peft_model)
    assert {inner_name(name) for name in adapted} == set(expected)
    assert adapted_layers(peft_model) == layers
    trained = trainable_parameters(peft_model)
    assert {inner_name(name): tuple(p.shape) for name, p in trained.items()} == shapes
    assert all(p.dtype == torch.float32 for p in trained.values())


@pytest.mark.parametrize(
    ("model_type", "names", "expected"),
    [
        ("gpt2", ["all-linear"], ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("gpt2", ["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        ("gpt2", ["mlp.c_proj"], ["mlp.c_proj"]),
        ("gpt2", ["c_fc", "attn.c_proj"], ["attn.c_proj", "mlp.c_fc"]),
        ("gpt2", ["c_fc", "mlp.c_fc", "c_fc"], ["mlp.c_fc"]),
        ("gpt2", ["c_fc", "all-linear"], ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("llama", ["q_proj", "down_proj"], ["self_attn.q_proj", "mlp.down_proj"]),
        ("opt", ["fc2"], ["fc2"]),
    ],
)
def test_target_names(model_type, names, expected, make_model):
    model = make_model(model_type)
    assert resolve_targets(Anatomy(model), names) == expected
    peft_model = attach(model, spec(targets=names), [1], seed=0)
    adapted = {inner_name(name).split(".1.", 1)[1] for name in adapted_modules(peft_model)}
    assert adapted == set(expected)


@pytest.mark.parametrize("name", ["nope", "proj", "attn", "c_attn.weight", "lm_head", "wte"])
def test_unknown_targets_are_refused_with_the_known_ones(name, make_model):
    with pytest.raises(UserError, match=f"no projection is called '{name}'; .*mlp.c_proj, or all"):
        attach(make_model("gpt2"), spec(targets=["c_fc", name]), [0], seed=0)


@pytest.mark.parametrize("names", [["all-linear", "nope"], ["nope", "all-linear"]])
def test_an_unknown_target_is_refused_beside_all_linear(names, make_model):
    with pytest.raises(UserError, match="no projection is called 'nope'; "):
        attach(make_model("gpt2"), spec(targets=names), [0], seed=0)


def test_a_layer_that_does_not_exist_is_refused(make_model):
    with pytest.raises(UserError, match="layer 3 does not exist; this model has 0 to 2"):
        attach(make_model("gpt2"), spec(), [1, 3], seed=0)


# What


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_formula(model_type, make_model):
    """y = W x + (alpha / r) B A x, for weights that are not zero."""
    model = make_model(model_type)
    p = Anatomy(model).projections(1)[-1]
    weight, bias = weight_out_in(p.module).clone(), getattr(p.module, "bias", None)
    peft_model = attach(model, spec(rank=5, alpha=7.0), [1], seed=0)
    parameters = {inner_name(n): q for n, q in trainable_parameters(peft_model).items()}
    a = parameters[f"{p.full_name}.lora_A.default.weight"]
    b = parameters[f"{p.full_name}.lora_B.default.weight"]
    b.data = torch.randn(b.shape, generator=torch.Generator().manual_seed(3))
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(4))
    adapted = {inner_name(n): m for n, m in adapted_modules(peft_model).items()}[p.full_name]
    expected = F.linear(x, weight, bias) + 7 / 5 * x @ a.T @ b.T
    torch.testing.assert_close(adapted(x), expected)


def test_before_training_the_model_is_the_base_model(make_model):
    expected = make_model("llama")(input_ids=TOKENS).logits
    peft_model = attach(make_model("llama"), spec(), [0, 1, 2], seed=0)
    assert torch.equal(peft_model(input_ids=TOKENS).logits, expected)


def values(model, seed: int) -> dict[str, torch.Tensor]:
    parameters = trainable_parameters(attach(model, spec(), [0, 2], seed=seed))
    return {name: p.detach().clone() for name, p in parameters.items()}


def test_initial_values_depend_on_the_seed_alone(make_model):
    torch.manual_seed(1)
    first = values(make_model("llama"), seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = values(make_model("llama"), seed=5)
    assert torch.equal(torch.get_rng_state(), state)  # and nobody else's random numbers move
    other = values(make_model("llama"), seed=6)
    assert list(first) == list(again) == list(other)
    for name in first:
        assert torch.equal(first[name], again[name])
        if "lora_A" in name:
            assert first[name].abs().min() > 0
            assert not torch.equal(first[name], other[name])
        else:
            assert not first[name].any()


def test_training_moves_the_adapter_and_nothing_else(make_model):
    model = make_model("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft_model = attach(model, spec(), [0, 2], seed=0)
    parameters = trainable_parameters(peft_model)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(2):
        peft_model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(start[name], p) for name, p in parameters.items())
    after = {
        inner_name(name).replace(".base_layer", ""): tensor
        for name, tensor in peft_model.state_dict().items()
        if ".lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_only_the_adapters_own_dropout_is_on(make_model):
    """GPT-2's config sets dropout 0.1 in the frozen model; that must stay off."""
    peft_model = attach(make_model("gpt2"), spec(dropout=0.5), [1], seed=0)
    train_mode(peft_model)
    active = {inner_name(n) for n, m in peft_model.named_modules() if m.training}
    assert active == {
        f"transformer.h.1.{name}.lora_dropout{inner}"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for inner in ("", ".default")
    }
    for name, p in trainable_parameters(peft_model).items():
        if "lora_B" in name:
            p.data.fill_(0.1)
    assert not torch.equal(peft_model(TOKENS).logits, peft_model(TOKENS).logits)
    without = attach(make_model("gpt2"), spec(dropout=0), [1], seed=0)
    train_mode(without)
    assert torch.equal(without(TOKENS).logits, without(TOKENS).logits)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_peft_says_nothing(model_type, make_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(make_model(model_type), spec(), [1], seed=0)
