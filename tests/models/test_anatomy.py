"""Anatomy: the table against the modules that tiny models of every family really have."""

import pytest
import torch
from tests.support.adapters import attach
from torch import nn
from transformers.pytorch_utils import Conv1D

from swlora.adapters.methods import adapted_modules
from swlora.config import AdapterSpec
from swlora.errors import UnknownFamilyError, UserError
from swlora.models.anatomy import (
    FAMILIES,
    MOE_FAMILIES,
    Anatomy,
    WeightAddress,
    bias_out,
    context_tokens,
    family_of,
    weight_out_in,
)

MOE_TYPES = sorted(t for family in MOE_FAMILIES for t in family.model_types)
MODEL_TYPES = sorted(t for family in FAMILIES for t in family.model_types) + MOE_TYPES
TOKENS = torch.tensor([[72, 105, 33, 10, 200]])

each_type = pytest.mark.parametrize("model_type", MODEL_TYPES)
each_moe_type = pytest.mark.parametrize("model_type", MOE_TYPES)


@each_type
def test_the_table_names_every_linear_map_of_the_blocks_and_no_other(model_type, make_model):
    model = make_model(model_type)
    anatomy = Anatomy(model)
    inside = {id(module) for block in anatomy.blocks for module in block.modules()}
    expected = {
        name: id(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside
    }
    assert anatomy.n_layers == 3
    assert {p.full_name: id(p.module) for p in anatomy.all_projections()} == expected
    for p in anatomy.all_projections():
        assert anatomy.projection(p.layer, p.name) is p.module


@each_type
def test_projections_come_in_forward_order(model_type, make_model):
    model = make_model(model_type)
    anatomy = Anatomy(model)
    called: list[tuple[int, str]] = []
    for p in anatomy.all_projections():
        p.module.register_forward_hook(lambda *_, p=p: called.append((p.layer, p.name)))
    model(input_ids=TOKENS)
    assert called == [(p.layer, p.name) for p in anatomy.all_projections()]


@each_type
def test_head_of_final_norm_is_the_logits(model_type, make_model):
    model = make_model(model_type)
    anatomy = Anatomy(model)
    normed: list[torch.Tensor] = []
    anatomy.final_norm.register_forward_hook(lambda _m, _x, y: normed.append(y))
    logits = model(input_ids=TOKENS).logits
    cap = getattr(model.config, "final_logit_softcapping", None)
    expected = anatomy.head(normed[0])
    torch.testing.assert_close(logits, cap * torch.tanh(expected / cap) if cap else expected)


def test_opt_with_norms_behind_and_narrow_embeddings(make_model):
    """OPT-350m: no norm after the last block, which a projection follows; the head is narrow."""
    model = make_model("opt", do_layer_norm_before=False, word_embed_proj_dim=12)
    anatomy = Anatomy(model)
    assert anatomy.final_norm is None
    hidden = anatomy.backbone(input_ids=TOKENS)[0]
    assert hidden.shape[-1] == 12
    torch.testing.assert_close(anatomy.head(hidden), model(input_ids=TOKENS).logits)


@each_type
def test_a_weight_is_addressed_by_the_channels_that_it_connects(model_type, make_model):
    """y[out] += delta * x[in], and no other y moves: the meaning of an address, tried out."""
    anatomy = Anatomy(make_model(model_type))
    generator = torch.Generator().manual_seed(7)
    for p in anatomy.projections(1):
        n_out, n_in = weight_out_in(p.module).shape
        x = torch.randn(n_in, generator=generator)
        before = p.module(x)
        assert before.shape == (n_out,)
        address = WeightAddress(1, p.name, out_channel=n_out - 2, in_channel=n_in - 5)
        anatomy.weight_view(address).add_(3.5)
        expected = torch.zeros(n_out)
        expected[n_out - 2] = 3.5 * x[n_in - 5]
        torch.testing.assert_close(p.module(x) - before, expected, rtol=1e-4, atol=1e-5)


@each_type
def test_what_goes_to_the_residual_stream(model_type, make_model):
    """Every output projection maps to the model's width, and each half of a block has one."""
    anatomy = Anatomy(make_model(model_type))
    for layer in range(3):
        out = [p for p in anatomy.projections(layer) if anatomy.family.feeds_residual(p.name)]
        assert len(out) == (2 if anatomy.experts(layer) is None else 1)
        assert all(len(weight_out_in(p.module)) == 24 for p in out)


@each_moe_type
@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_a_slice_of_the_experts_is_addressed_like_a_projection(model_type, part, make_model):
    anatomy = Anatomy(make_model(model_type))
    experts = anatomy.experts(2)
    name = f"mlp.experts.3.{part}"
    weight = weight_out_in(anatomy.projection(2, name))
    assert torch.equal(weight, experts.get_parameter(part)[3])
    assert bias_out(anatomy.projection(2, name)) is None
    n_out, n_in = weight.shape
    before = experts.get_parameter(part).clone()
    anatomy.weight_view(WeightAddress(2, name, n_out - 2, n_in - 5)).fill_(3.5)
    changed = (experts.get_parameter(part) != before).nonzero().tolist()
    assert changed == [[3, n_out - 2, n_in - 5]]
    assert anatomy.family.feeds_residual(name) == (part == "down_proj")
    with pytest.raises(UserError, match="lies outside"):
        anatomy.weight_view(WeightAddress(2, name, n_out, 0))


@each_moe_type
def test_an_expert_moves_the_tokens_that_are_routed_to_it(model_type, make_model):
    anatomy = Anatomy(make_model(model_type))
    experts = anatomy.experts(0)
    hidden = torch.randn(4, 24, generator=torch.Generator().manual_seed(7))
    index = torch.tensor([[0, 3], [3, 1], [2, 4], [1, 0]])
    routing = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.6, 0.2]])
    before = experts(hidden, index, routing)
    gate, up = anatomy.projection(0, "mlp.experts.3.gate_up_proj")(hidden).chunk(2, dim=-1)
    inner = nn.functional.silu(gate) * up
    anatomy.weight_view(WeightAddress(0, "mlp.experts.3.down_proj", 17, 8)).add_(3.5)
    expected = torch.zeros(4, 24)
    expected[0, 17] = 3.5 * 0.1 * inner[0, 8]
    expected[1, 17] = 3.5 * 0.7 * inner[1, 8]
    moved = experts(hidden, index, routing) - before
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (0, "mlp.experts.5.down_proj"),
        (0, "mlp.experts.-1.down_proj"),
        (0, "mlp.experts.03.down_proj"),
        (0, "mlp.experts.3.up_proj"),
        (0, "mlp.experts.down_proj"),
        (0, "mlp.down_proj"),  # a block with experts has no plain MLP,
        (1, "mlp.experts.3.down_proj"),  # and the other way round
    ],
)
def test_experts_that_do_not_exist(layer, name, make_model):
    known = "mlp.down_proj" if layer else "mlp.experts.0 to 4.gate_up_proj, mlp.experts.0 to 4.down"
    with pytest.raises(UserError, match=f"no projection is called '{name}'; .*{known}"):
        Anatomy(make_model("qwen3_moe")).projection(layer, name)


@each_moe_type
def test_adapters_sit_on_the_attention_of_mixtures_of_experts(model_type, make_model):
    model = make_model(model_type)
    peft_model = attach(model, AdapterSpec(targets=["all-linear"], rank=3), [0, 2], seed=0)
    ends = [f"self_attn.{part}_proj" for part in "qkvo"]
    expected = [f"model.layers.{layer}.{end}" for layer in (0, 2) for end in ends]
    names = [name.removeprefix("base_model.model.") for name in adapted_modules(peft_model)]
    assert names == expected
    for part in ("down_proj", "gate_up_proj", "mlp.experts.3.down_proj"):
        with pytest.raises(UserError, match=f"no projection is called '{part}'"):
            attach(make_model(model_type), AdapterSpec(targets=[part]), [0], seed=0)


def test_storage_order_differs_between_linear_and_conv1d(make_model):
    """Without this, the test above could pass with one branch never taken."""
    gpt2 = Anatomy(make_model("gpt2")).projection(0, "mlp.c_proj")
    llama = Anatomy(make_model("llama")).projection(0, "mlp.down_proj")
    assert isinstance(gpt2, Conv1D)
    assert tuple(gpt2.weight.shape) == (40, 24)
    assert tuple(llama.weight.shape) == tuple(weight_out_in(gpt2).shape) == (24, 40)


@pytest.mark.parametrize(
    ("layer", "module", "out_channel", "in_channel", "said"),
    [
        (3, "mlp.down_proj", 0, 0, r"layer 3 does not exist; this model has 0 to 2"),
        (-1, "mlp.down_proj", 0, 0, r"layer -1 does not exist"),
        (0, "mlp.nope", 0, 0, r"no projection is called 'mlp\.nope'; this model has .*mlp\.up"),
        (0, "mlp.down_proj", 24, 0, r"outside the weight of shape \[out 24, in 40\]"),
        (0, "mlp.down_proj", 0, 40, r"outside the weight of shape \[out 24, in 40\]"),
        (0, "mlp.down_proj", -1, 0, "outside the weight"),
    ],
)
def test_addresses_that_do_not_exist(layer, module, out_channel, in_channel, said, make_model):
    anatomy = Anatomy(make_model("llama"))
    with pytest.raises(UserError, match=said):
        anatomy.weight_view(WeightAddress(layer, module, out_channel, in_channel))


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(UnknownFamilyError, match="'bloom' are not supported") as refused:
        family_of("bloom")
    assert all(model_type in str(refused.value) for model_type in MODEL_TYPES)
    assert len(str(refused.value).splitlines()) == 1


def test_a_variant_without_the_expected_parts_is_refused(make_model):
    model = make_model("opt")
    del model.model.decoder.final_layer_norm
    with pytest.raises(UnknownFamilyError, match="opt"):
        Anatomy(model)


def test_the_context_is_the_models_own(make_model):
    assert context_tokens(make_model("gpt2")) == context_tokens(make_model("llama")) == 256
    assert context_tokens(make_model("opt", max_position_embeddings=99)) == 99
