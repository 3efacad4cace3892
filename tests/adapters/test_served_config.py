"""Adapters as the server loads them: by what their file holds, and as PEFT would."""

import json
import time
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from tests.support.adapters import randomise

from swlora.adapters import served_config as module
from swlora.adapters.served_config import served_config
from swlora.errors import UserError

TOKENS = torch.tensor([[72, 105, 33, 10, 200], [1, 2, 3, 4, 5]])
SETTINGS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "all": {"target_modules": "all-linear"},
    "an expression": {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"0.self_attn.v_proj": 5, ".*up_proj": 2},
        "alpha_pattern": {r"layers.\d+.self_attn.q_proj": 3},
    },
    "layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
}


def saved(make_model, folder: Path, model_type: str = "llama", **settings) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 7} | settings)
    model = get_peft_model(make_model(model_type), config)
    randomise(model, 0.2)
    model.save_pretrained(str(folder))
    return folder


def change(folder: Path, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("name", SETTINGS)
def test_it_computes_what_pefts_own_loader_gives(name, make_model, tmp_path):
    folder = saved(make_model, tmp_path / "a", **SETTINGS[name])
    expected = peft.PeftModel.from_pretrained(make_model("llama"), str(folder)).eval()
    model = make_model("llama")
    ours = PeftModelForCausalLM(model, served_config(model, folder), "mine").eval()
    report = ours.load_adapter(str(folder), "mine")
    assert not report.missing_keys and not report.unexpected_keys
    with torch.no_grad():
        assert torch.equal(ours(TOKENS).logits, expected(TOKENS).logits)
        assert not torch.equal(ours(TOKENS).logits, make_model("llama")(TOKENS).logits)


def test_gpt2s_maps_are_turned(make_model, tmp_path):
    folder = saved(make_model, tmp_path, "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    assert served_config(make_model("gpt2"), folder).fan_in_fan_out


def test_an_expression_for_the_targets_is_not_matched(make_model, tmp_path):
    folder = saved(make_model, tmp_path, target_modules=["q_proj"])
    change(folder, target_modules="[this is no expression")
    assert len(served_config(make_model("llama"), folder).target_modules) == 3


REFUSED = {
    "an absurd rank": ({"r": 900_000}, r"has rank 3, and adapter_config\.json says another"),
    "no rank at all": ({"r": 100_000_000}, "no number as r"),
    "no rank": ({"r": "3"}, "no number as r"),
    "an infinite scale": ({"lora_alpha": 1e300}, "no number as lora_alpha"),
    "an expression": ({"alpha_pattern": {"(a|b)*": 2}}, "has the expression"),
    "other targets": ({"target_modules": ["k_proj"]}, "none of its target_modules"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_at_once(name, make_model, tmp_path):
    settings, reason = REFUSED[name]
    folder = saved(make_model, tmp_path, target_modules=["q_proj"])
    change(folder, **settings)
    model = make_model("llama")
    start_s = time.process_time()
    with pytest.raises(UserError, match=reason) as refused:
        served_config(model, folder)
    assert time.process_time() - start_s < 5 and len(str(refused.value).splitlines()) == 1


def test_shapes_of_another_model_and_a_long_header(make_model, tmp_path, monkeypatch):
    folder = saved(make_model, tmp_path, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"q_proj has other shapes in it than this model"):
        served_config(make_model("llama", hidden_size=48), folder)
    with pytest.raises(UserError, match=r"this model has no model\.layers"):
        served_config(make_model("gpt2"), folder)
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 10)
    with pytest.raises(UserError, match=r"header of its adapter_model\.safetensors is"):
        served_config(make_model("llama"), folder)
