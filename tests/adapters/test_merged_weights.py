"""Merged weights: those of PEFT's own `merge_and_unload` in float32, for all that PEFT saves."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, SupertuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.support.adapters import CASES, adapter_spec, move

from swlora.adapters.merged_weights import MergedWeights
from swlora.adapters.methods import adapt
from swlora.adapters.saved import CONFIG, WEIGHTS, save_adapter
from swlora.errors import UserError


def merged_by_peft(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return {name: weight.detach() for name, weight in merged.named_parameters()}


def assert_merged_as_by_peft(make_model, model_type: str, folder: Path, **changes: Any) -> None:
    model = make_model(model_type, **changes)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    merging = MergedWeights(folder, model)
    merging.check_own(lambda name: weights[name])
    expected = merged_by_peft(make_model(model_type, **changes), folder)
    changed = {name for name in weights if not torch.equal(weights[name], expected[name])}
    assert set(merging.changed) == changed and changed
    for name in merging.changed:
        before = weights[name].clone()
        found = merging.merged(name, weights[name])
        assert torch.equal(weights[name], before)
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=2e-6)


def saved_by_peft(model: Any, folder: Path, config: Any, size: float = 0.1) -> Path:
    """An adapter that plain PEFT made, all its trained weights moved."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, config)
        move((p for p in peft_model.parameters() if p.requires_grad), size)
        peft_model.save_pretrained(str(folder))
    return folder


def lora(**settings: Any) -> LoraConfig:
    plain = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    return LoraConfig(task_type="CAUSAL_LM", **plain | settings)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def refusal(make_model, folder: Path, model_type: str = "llama") -> str:
    with pytest.raises(UserError) as refused:
        model = make_model(model_type)
        MergedWeights(folder, model).check_own(model.get_parameter)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_every_method_is_merged_as_by_peft(make_model, method, model_type, tmp_path):
    adapted = adapt(make_model(model_type), adapter_spec(method), [0, 2], seed=1, n_steps=20)
    move(adapted.parameters.values(), 0.2 if method == "adalora" else 0.05)
    adapted.finish()
    save_adapter(adapted.model, tmp_path / "a", {})
    assert_merged_as_by_peft(make_model, model_type, tmp_path / "a")


FAMILIES = ["phi3", "gpt_neox", "opt", "falcon", "gemma3_text", "qwen2", "mixtral", "smollm3"]


@pytest.mark.parametrize("method", ["rslora", "dora"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_shape_of_family_is_merged_as_by_peft(make_model, method, model_type, tmp_path):
    adapted = adapt(make_model(model_type), adapter_spec(method), [1], seed=1)
    move(adapted.parameters.values(), 0.05)
    save_adapter(adapted.model, tmp_path / "a", {})
    assert_merged_as_by_peft(make_model, model_type, tmp_path / "a")


OF_PLAIN_PEFT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patterns": ({"rank_pattern": {"1.mlp.down_proj": 2}, "alpha_pattern": {"q_proj": 1}}, {}),
    "patterns, rslora": ({"alpha_pattern": {".*down_proj": 2}, "use_rslora": True}, {}),
    "excluded": ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, {}),
    "some layers": ({"layers_to_transform": [1], "layers_pattern": "layers"}, {}),
    "biases": ({"bias": "all"}, {"attention_bias": True}),
    "biases of lora": ({"bias": "lora_only"}, {"attention_bias": True}),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, {"attention_bias": True}),
    "norms": ({"modules_to_save": ["norm", "input_layernorm"]}, {}),
    "head and embedding": ({"modules_to_save": ["lm_head", "embed_tokens"]}, {}),
    "lora of both": ({"target_modules": ["lm_head", "embed_tokens", "q_proj"]}, {}),
    "dora of both": ({"target_modules": ["lm_head", "embed_tokens"], "use_dora": True}, {}),
    "tokens": ({"trainable_token_indices": [3, 250]}, {}),
    "tokens of both": ({"trainable_token_indices": {"lm_head": [1], "embed_tokens": [3, 5]}}, {}),
    "another start": ({"init_lora_weights": "gaussian"}, {}),
    "pissa": ({"init_lora_weights": "pissa"}, {}),
}


@pytest.mark.parametrize("name", OF_PLAIN_PEFT)
def test_what_plain_peft_saves_is_merged_as_by_peft(make_model, name, tmp_path):
    settings, of_model = OF_PLAIN_PEFT[name]
    folder = saved_by_peft(make_model("llama", **of_model), tmp_path, lora(**settings))
    assert_merged_as_by_peft(make_model, "llama", folder, **of_model)


def test_supertuning_with_lora_is_merged_as_by_peft(make_model, tmp_path):
    config = SupertuningConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], sparsity=0.9, r=2, lora_alpha=3.0
    )
    folder = saved_by_peft(make_model("llama"), tmp_path, config)
    assert_merged_as_by_peft(make_model, "llama", folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_is_added_in_float32(make_model, tmp_path, dtype):
    folder = saved_by_peft(make_model("llama"), tmp_path, lora())
    halves = {name: t.to(dtype) for name, t in load_file(folder / WEIGHTS).items()}
    save_file(halves, folder / WEIGHTS)
    assert_merged_as_by_peft(make_model, "llama", folder)


def test_patterns_that_overlap_are_read_as_peft_loads_them_and_noted(make_model, tmp_path):
    patterns = {"self_attn.q_proj": 24, "1.self_attn.q_proj": 3}  # saved sorted
    folder = saved_by_peft(make_model("llama"), tmp_path, lora(alpha_pattern=patterns))
    assert_merged_as_by_peft(make_model, "llama", folder)
    (note,) = MergedWeights(folder, make_model("llama")).notes
    assert "alpha_pattern" in note and "model.layers.1.self_attn.q_proj" in note


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"peft_type": "IA3"}, "its type is IA3"),
    "a random start": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
    "layers that repeat": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    "invoked": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "a field of the future": ({"spin_lora": {"x": 1}}, "spin_lora"),
    "no rank": ({"r": 0}, "rank"),
    "another rank": ({"r": 5}, "has rank 3 and not 5"),
    "dora without norms": ({"use_dora": True}, "alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_added_to_weights_is_refused_by_name(make_model, name, tmp_path):
    folder = saved_by_peft(make_model("llama"), tmp_path, lora())
    change_config(folder, **REFUSED[name][0])
    assert REFUSED[name][1] in refusal(make_model, folder)


def test_an_adapter_of_another_model_is_refused(make_model, tmp_path):
    folder = saved_by_peft(make_model("llama"), tmp_path, lora())
    assert "the model has no module" in refusal(make_model, folder, "gpt2")
    wider = saved_by_peft(make_model("llama", hidden_size=32), tmp_path / "wider", lora())
    assert "belongs to another model" in refusal(make_model, wider)


def test_a_bias_without_a_place_is_refused(make_model, tmp_path):
    folder = saved_by_peft(make_model("llama"), tmp_path, lora(lora_bias=True))
    assert "the model has none there" in refusal(make_model, folder)


def test_other_numbers_for_the_models_own_are_refused(make_model, tmp_path):
    targets = ["embed_tokens", "q_proj"]  # beside which PEFT saves the embedding
    folder = saved_by_peft(make_model("llama", seed=7), tmp_path, lora(target_modules=targets))
    assert "brings other numbers for model.embed_tokens.weight" in refusal(make_model, folder)


def test_numbers_that_are_not_finite_are_refused(make_model, tmp_path):
    folder, model = saved_by_peft(make_model("llama"), tmp_path, lora()), make_model("llama")
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    merging = MergedWeights(folder, model)
    with pytest.raises(UserError, match="not finite"):
        for name in merging.changed:
            merging.merged(name, model.get_parameter(name))


def test_keys_that_peft_does_not_write_are_refused(make_model, tmp_path):
    folder = saved_by_peft(make_model("llama"), tmp_path, lora())
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"model.norm.weight": torch.ones(24)}, folder / WEIGHTS)
    assert "is no name that PEFT gives" in refusal(make_model, folder)
    save_file(tensors | {"base_model.model.x.weight": torch.ones(24)}, folder / WEIGHTS)
    assert "the model has no x.weight" in refusal(make_model, folder)
    (folder / WEIGHTS).write_bytes(b"cut off")
    assert "cannot be read" in refusal(make_model, folder)
