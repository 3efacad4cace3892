"""Adapters that come and go: while one is on, it is PEFT's; afterwards the model is as before."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.support.adapters import move

from swlora.adapters.methods import adapt
from swlora.adapters.saved import load_adapter, save_adapter
from swlora.adapters.temporary import adapter_off, adapter_on
from swlora.config import AdapterSpec
from swlora.errors import UserError

TOKENS = torch.tensor([[72, 105, 33, 10, 200], [1, 2, 3, 4, 5]])


@pytest.fixture
def saved(make_model, tmp_path):
    """A function method -> the folder of an adapter of that method with random weights."""

    def save(method: str, model_type: str = "llama"):
        adapted = adapt(
            make_model(model_type), AdapterSpec(method=method), [0, 2], seed=1, n_steps=9
        )
        move(adapted.parameters.values(), 0.1)
        adapted.finish()
        save_adapter(adapted.model, tmp_path / method, {})
        return tmp_path / method

    return save


def state(model) -> dict[str, object]:
    """All that a model is made of."""
    weights = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    modules = {name: id(module) for name, module in model.named_modules()}
    return {"weights": weights, "modules": modules, "peft": hasattr(model, "peft_config")}


def assert_same(before, after) -> None:
    assert (before["modules"], before["peft"]) == (after["modules"], after["peft"])
    assert list(before["weights"]) == list(after["weights"])
    for name, (place, values, free) in before["weights"].items():
        assert (place, free) == (after["weights"][name][0], after["weights"][name][2])
        assert torch.equal(values, after["weights"][name][1])


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "pissa", "full", "supertuning"])
def test_the_model_is_as_before(method, saved, make_model):
    folder, model = saved(method), make_model("llama")
    before, logits = state(model), model(input_ids=TOKENS).logits
    expected = load_adapter(make_model("llama"), folder)(input_ids=TOKENS).logits
    for _ in range(2):
        with adapter_on(model, folder) as adapted:
            assert torch.equal(adapted(input_ids=TOKENS).logits, expected)
            assert not torch.equal(expected, logits)
        assert_same(before, state(model))
        assert torch.equal(model(input_ids=TOKENS).logits, logits)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_weights_that_peft_computes_anew_come_back(start, make_model, tmp_path):
    """Such an adapter of PEFT's own leaves a residual in the model; OLoRA's is written in place."""
    config = LoraConfig(r=2, init_lora_weights=start, target_modules=["q_proj"])
    get_peft_model(make_model("llama"), config).save_pretrained(tmp_path)
    model = make_model("llama")
    before = state(model)
    with adapter_on(model, tmp_path):
        inside = model.model.layers[0].self_attn.q_proj.base_layer.weight
        assert not torch.equal(
            inside, before["weights"]["model.layers.0.self_attn.q_proj.weight"][1]
        )
    assert_same(before, state(model))


def test_an_adapter_that_does_not_fit_leaves_nothing(saved, make_model):
    folder, model = saved("lora"), make_model("llama", intermediate_size=44)
    before = state(model)
    with pytest.raises(UserError, match="does not fit this model"), adapter_on(model, folder):
        pass
    assert_same(before, state(model))


def test_an_error_in_the_body_leaves_nothing(saved, make_model):
    folder, model = saved("full", "gpt2"), make_model("gpt2")
    before = state(model)
    with pytest.raises(ZeroDivisionError), adapter_on(model, folder):
        raise ZeroDivisionError
    assert_same(before, state(model))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "pissa", "full", "supertuning"])
@pytest.mark.parametrize("is_trained", [True, False])
def test_an_adapter_is_off_for_a_while(method, is_trained, saved, make_model):
    """PEFT would leave its tensors to be trained, also those of an adapter that is only used."""
    adapted = load_adapter(make_model("llama"), saved(method)).requires_grad_(is_trained)
    before, expected = state(adapted), make_model("llama")(input_ids=TOKENS).logits
    with adapter_off(adapted):
        assert torch.equal(adapted(input_ids=TOKENS).logits, expected)
    assert_same(before, state(adapted))
    assert not torch.equal(adapted(input_ids=TOKENS).logits, expected)


def test_a_model_without_adapter_is_what_it_is(make_model):
    model = make_model("llama")
    before = state(model)
    with adapter_off(model):
        assert_same(before, state(model))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init_lora_weights": "pissa"}, r"began with a part of the weights \(pissa\)"),
        ({"bias": "all"}, "changed the model's own biases"),
        ({}, "is merged into the weights"),
    ],
)
def test_what_stays_of_an_adapter_is_named(settings, reason, make_model):
    config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
    adapted = get_peft_model(make_model("llama"), config)
    if not settings:
        adapted.merge_adapter()
    with pytest.raises(UserError, match=f"{reason}.*--no-english"), adapter_off(adapted):
        pass
