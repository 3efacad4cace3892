"""The meter: the losses of plain whole passes, of fewer blocks; the model is left as it was."""

import json
import math
from contextlib import suppress

import pytest
import torch
from torch.nn import functional as F

from swlora.errors import RunFailedError, UserError
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.superweights.ablate import scaled
from swlora.superweights.meter import BLOCK_TOKENS, MAX_NATS, BlockLosses, Meter, rise_nats

FAMILIES = ("llama", "gpt2", "opt", "gpt_neox", "falcon", "gemma2", "gemma3_text", "phi3")
MOE = ("mixtral", "qwen3_moe")


def windows(n: int = 3, n_tokens: int = 150) -> torch.Tensor:
    return torch.randint(0, 256, (n, n_tokens), generator=torch.Generator().manual_seed(1))


def planted(model) -> list[WeightAddress]:
    """Four weights in three blocks, two of them in one, large enough to matter when zero."""
    family = Anatomy(model).family
    mlp_out = f"{family.experts}.3.down_proj" if family.experts else family.mlp_out
    middle = "mlp.down_proj" if model.config.model_type == "qwen3_moe" else mlp_out
    addresses = [
        WeightAddress(0, mlp_out, 5, 7),
        WeightAddress(1, middle, 2, 27),
        WeightAddress(1, family.attention_out, 3, 2),
        WeightAddress(2, family.attention_in[0], 1, 23),
    ]
    for address in addresses:
        Anatomy(model).weight_view(address).fill_(7.0)
    return addresses


def plain_losses(model, token_ids: torch.Tensor, scales) -> list[float]:
    """Whole passes, one window at a time; every loss is added to the block of its token."""
    sums: list[float] = []
    with scaled(Anatomy(model), scales):
        for window in token_ids:
            logits = model(input_ids=window[None]).logits[0, :-1].double()
            nats = F.cross_entropy(logits, window[1:], reduction="none")
            blocks = [0.0] * math.ceil(len(nats) / BLOCK_TOKENS)
            for t, value in enumerate(nats.tolist()):
                blocks[t // BLOCK_TOKENS] += value
            sums += blocks
    return sums


@pytest.mark.parametrize("cache_bytes", [0, 30_000, 1 << 30])  # no state, two, all
@pytest.mark.parametrize("model_type", [*FAMILIES, *MOE])
def test_every_set_gives_the_losses_of_plain_whole_passes(model_type, cache_bytes, make_model):
    model = make_model(model_type)
    a, b, c, d = planted(model)
    meter = Meter(model, windows(1, 150), cache_bytes=cache_bytes)
    meter.measure({}, keep=[1, 2])
    meter.measure(dict.fromkeys([a, b, c, d], 0.0), keep=[1, 2])
    sets = [{}, {d: 0}, {b: 0}, {a: 0}, {b: 0, c: 0, d: 0}, {a: 0, d: 0}, {a: 0, c: 0, d: 0}]
    sets += [{a: 0, b: 0, c: 0}, {a: 0, b: 0, c: 0, d: 0}, {a: 0, b: 0.5}, {c: 2}, {b: 1, d: -1}]
    base = plain_losses(model, meter.windows, {})
    for scales in sets:
        found = meter.measure(scales)
        expected = plain_losses(model, meter.windows, scales)
        assert found.n_tokens == (64, 64, 21)
        assert found.sums_nats == pytest.approx(expected, rel=1e-6)
        assert not scales or expected != pytest.approx(base, rel=1e-4)


NARROW = {"do_layer_norm_before": False, "word_embed_proj_dim": 12}  # as OPT-350m


@pytest.mark.parametrize(("model_type", "changes"), [("llama", {}), ("opt", NARROW)])
def test_batches_and_first_windows_change_nothing(model_type, changes, make_model):
    model = make_model(model_type, **changes)
    token_ids = windows(20, 130)  # 2,600 tokens: two batches
    addresses = planted(model)
    meter = Meter(model, token_ids)
    meter.measure({}, keep=[1])
    for scales in ({}, {addresses[1]: 0.0}, {addresses[0]: 0.0, addresses[3]: 0.0}):
        few = meter.measure(scales, n_windows=2)
        assert few.n_tokens == (64, 64, 1) * 2
        all_of_them = meter.measure(scales)
        expected = plain_losses(model, token_ids, scales)
        assert all_of_them.sums_nats == pytest.approx(expected, rel=1e-6)
        assert few.sums_nats == pytest.approx(expected[:6], rel=1e-6)
        assert meter.measure(scales, n_windows=3) == all_of_them.first(9)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 1e-5), (torch.float64, 1e-12)])
def test_other_dtypes(dtype, rel, make_model):
    model = make_model("llama").to(dtype)
    a, _, _, d = planted(model)
    meter = Meter(model, windows())
    for scales in ({a: 0.0}, {d: 0.0}, {a: 0.0, d: 0.0}):
        expected = plain_losses(model, windows(), scales)
        assert meter.measure(scales).sums_nats == pytest.approx(expected, rel=rel)


def test_only_the_blocks_from_the_lowest_weight_on_run(make_model):
    model, ran = make_model("llama"), []
    for layer, block in enumerate(model.model.layers):
        block.self_attn.o_proj.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    a, b, c, d = planted(model)
    meter = Meter(model, windows())

    def blocks_of(addresses: list[WeightAddress], scale: float = 0.0) -> list[int]:
        ran.clear()
        meter.measure(dict.fromkeys(addresses, scale))
        return list(ran)

    meter.measure({}, keep=[1, 2])
    meter.measure(dict.fromkeys([a, b, c, d], 0.0), keep=[1, 2])
    assert blocks_of([d]) == [2]
    assert blocks_of([b]) == [1, 2]
    assert blocks_of([b, d]) == [1, 2]
    assert blocks_of([a, b, c]) == [2]  # all but the last, from the joint pass
    assert blocks_of([a]) == [1, 2]  # the joint pass has no other change in block 0
    assert blocks_of([a], 0.5) == [0, 1, 2]
    assert blocks_of([a, c, d]) == [1, 2]
    assert blocks_of([a, b, c, d]) == []  # known
    assert blocks_of([c, b, c, a]) == []
    assert blocks_of([]) == []


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_the_model_is_whole_after_a_failure_anywhere(
    model_type, error, make_model, weights_sha256, monkeypatch
):
    model = make_model(model_type)
    addresses = planted(model)
    anatomy, before = Anatomy(model), weights_sha256(model)
    meter = Meter(model, windows())
    expected = Meter(model, windows()).ablate(addresses[1:])
    meter.measure({}, keep=[1])
    places = [anatomy.blocks[1].get_submodule(p) for p in anatomy.family.projections]
    for module in [anatomy.blocks[2].get_submodule(anatomy.family.mlp_out), *places]:
        hook = module.register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            meter.ablate(addresses[1:])
        hook.remove()
        assert weights_sha256(model) == before
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(torch, "softmax", lambda *_, **__: (_ for _ in ()).throw(error))
        meter.ablate(addresses[1:])
    assert weights_sha256(model) == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert meter.ablate(addresses[1:]) == expected  # nothing of the failures was remembered


def test_a_hundred_ablations_leave_every_bit(make_model, weights_sha256):
    model = make_model("gpt2")
    before, random = weights_sha256(model), torch.Generator().manual_seed(3)
    meter = Meter(model, windows(1, 20))
    for _ in range(100):
        layer, out, k, many = torch.randint(0, 1000, (4,), generator=random).tolist()
        address = WeightAddress(layer % 3, "mlp.c_proj", out % 24, k % 40)
        other = WeightAddress(k % 3, "attn.c_attn", many % 72, out % 24)
        with suppress(UserError):
            meter.measure({address: 0.0, other: (many % 5) / 2} if many % 2 else {address: 0.0})
    assert weights_sha256(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_beyond_all_bounds_is_700_nats(make_model):
    model = make_model("llama")
    address = WeightAddress(2, "mlp.down_proj", 0, 0)
    meter = Meter(model, windows(2, 70))
    losses = meter.measure({address: 1e39})  # infinite in float32
    assert losses.sums_nats == (64 * MAX_NATS, 5 * MAX_NATS) * 2
    assert losses.total.perplexity == pytest.approx(math.exp(700))
    json.dumps([losses.total.perplexity, math.exp(rise_nats(meter.measure({}), losses))])
    Anatomy(model).weight_view(address).fill_(math.inf)
    with pytest.raises(RunFailedError, match="not finite"):
        Meter(model, windows()).measure({})


def test_finite_losses_are_bounded_token_by_token(make_model):
    model = make_model("llama")
    Anatomy(model).final_norm.weight.mul_(200)
    window = windows(1, 40)
    logits = model(input_ids=window).logits[0, :-1].double()
    nats = F.cross_entropy(logits, window[0, 1:], reduction="none").tolist()
    assert min(nats) < MAX_NATS < max(nats) < math.inf
    expected = sum(min(value, 700.0) for value in nats)
    assert Meter(model, window).measure({}).total.sum_nats == pytest.approx(expected, rel=1e-6)


def test_a_rise_is_that_of_the_mean_loss_of_a_token():
    base, ablated = BlockLosses((64.0, 3.0), (64, 3)), BlockLosses((64.0, 70.0), (64, 3))
    assert rise_nats(base, ablated) == pytest.approx(1.0)  # not the mean of 0 and 67 / 3
    assert base.total.n_tokens == 67


def test_what_cannot_be_measured(make_model):
    model = make_model("llama")
    for bad in (windows(0, 9), windows(2, 1), windows()[0]):
        with pytest.raises(UserError, match="at least one window"):
            Meter(model, bad)
    with pytest.raises(UserError, match="257 tokens exceed the model's context of 256"):
        Meter(model, windows(1, 257))
    meter, address = Meter(model, windows()), WeightAddress(0, "mlp.down_proj", 0, 0)
    for factor in (math.inf, math.nan):
        with pytest.raises(UserError, match="finite"):
            meter.measure({address: factor})
    for n in (0, 4):
        with pytest.raises(UserError, match=f"there are 3 windows of text, not {n}"):
            meter.measure({}, n_windows=n)
    with pytest.raises(UserError, match=r"not all of layers \[1, 3\] exist"):
        meter.measure({}, keep=[3, 1])
    with pytest.raises(UserError, match="outside"):
        meter.ablate([WeightAddress(0, "mlp.down_proj", 99, 0)])
