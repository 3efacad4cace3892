"""A model computed in float32 a block at a time: the same numbers as cast whole, and given back."""

from typing import Any

import pytest
import torch
from tests.support.adapters import adapter_spec, attach, randomise
from transformers import AutoModelForCausalLM

from swlora.deploy.in_float32 import computed_in_float32, units_of
from swlora.models.precision import cast_parameters

TOKENS = torch.tensor([[72, 105, 33, 10, 200]])


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


def from_files(make_model, folder, model_type: str, dtype: torch.dtype) -> Any:
    make_model(model_type).to(dtype).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "falcon", "mixtral", "gemma3_text"])
def test_logits_are_those_of_the_model_cast_whole(make_model, tmp_path, model_type, dtype):
    model = from_files(make_model, tmp_path, model_type, dtype)
    held = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    before = logits_of(model)
    with computed_in_float32(model):
        found = [logits_of(model) for _ in range(2)]
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == held[name][0]
        assert torch.equal(parameter, held[name][1]) and parameter.dtype == dtype
    assert torch.equal(logits_of(model), before)
    cast_parameters(model, torch.float32)
    expected = logits_of(model)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], found[1])


def test_an_adapter_takes_part(make_model, tmp_path):
    model = from_files(make_model, tmp_path, "llama", torch.bfloat16)
    adapted = attach(model, adapter_spec("dora"), [0, 2], seed=1).eval()
    randomise(adapted, 0.1)
    with computed_in_float32(adapted):
        found = logits_of(adapted)
    cast_parameters(adapted, torch.float32)
    torch.testing.assert_close(found, logits_of(adapted), rtol=1e-5, atol=1e-5)


def test_weights_are_put_back_after_an_error(make_model, tmp_path):
    model = from_files(make_model, tmp_path, "llama", torch.bfloat16)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of a block")

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="middle"), computed_in_float32(model):
        logits_of(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox", "qwen3_moe"])
def test_units_hold_every_weight(make_model, model_type):
    model = make_model(model_type)
    in_units = {id(p) for unit in units_of(model) for p in unit.parameters()}
    assert in_units == {id(p) for p in model.parameters()}
