"""LoRA as GGUF: llama.cpp with the file computes what PEFT does, whatever PEFT's fields say."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from tests.support.gguf_models import save_tiny
from tests.support.llama_cpp import require_llama_cpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from swlora.config import ModelSpec
from swlora.deploy import gguf_export
from swlora.deploy.gguf_export import Exported, ExportRequest
from swlora.deploy.gguf_lora import Pair, common_alpha
from swlora.errors import RunFailedError, UserError
from swlora.progress import Silent
from swlora.superweights.ablate import text_windows

ALL = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    **{
        name: ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
        for name in ("gpt_neox", "falcon")
    },
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = ("mixtral", "qwen3_moe", "olmoe")


def adapter(model_type: str, folder: Path, **settings: Any) -> None:
    """Save a tiny model in folder/model and an adapter with weights of its own in folder/adapter.

    B, of the size `b`, is large beside the weights, so that an adapter in the wrong order shows.
    """
    save_tiny(model_type, folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    b = settings.pop("b", 0.3)
    known = ALL.get(model_type, ATTENTION if model_type in EXPERTS else LINEAR)
    kind = settings.pop("config_class", LoraConfig)
    sizes = {"init_r": 3, "target_r": 2, "total_step": 9} if kind is AdaLoraConfig else {"r": 3}
    settings = {"target_modules": known, **settings}
    config = kind(task_type="CAUSAL_LM", **sizes, **settings)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            scale = b if "lora_B" in name else 0.3
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    peft_model.save_pretrained(folder / "adapter")


def export_lora(folder: Path, **settings: Any) -> Exported:
    spec = ModelSpec(name=str(folder / "model"), device="cpu")
    request = ExportRequest(spec, folder / "x.gguf", adapter=folder / "adapter", **settings)
    return gguf_export.export(request, Silent())


def alpha_of(path: Path) -> float:
    field = gguf.GGUFReader(path).get_field("adapter.lora.alpha")
    assert field is not None and field.types == [gguf.GGUFValueType.FLOAT32]
    return float(field.contents())


MODEL_TYPES = (
    *("llama", "mistral", "smollm3", "olmo", "olmo2", "qwen2", "qwen3", "gemma", "gemma2"),
    *("gemma3_text", "phi3", "gpt2", "gpt_neox", "falcon", *EXPERTS),
)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_projection_of_every_family(model_type: str, tmp_path: Path) -> None:
    require_llama_cpp()
    adapter(model_type, tmp_path, lora_alpha=5)
    found = export_lora(tmp_path).check.agreement
    assert found.kl_nats_per_token < 1e-6
    assert found.largest_logit_difference < 1e-2
    assert alpha_of(tmp_path / "x.gguf") == 5


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"use_rslora": True, "lora_alpha": 5}, float(np.float32(5 * 3**0.5))),
        ({"rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 1}, "lora_alpha": 5}, 5),
        ({"alpha_pattern": {"q_proj": 50.0, "layers.1.self_attn.k_proj": 0.5}}, 8),
        ({"config_class": AdaLoraConfig, "lora_alpha": 2}, None),
    ],
)
def test_scales_are_folded_so_that_the_file_has_one_alpha(
    settings: dict[str, Any], alpha: float | None, tmp_path: Path
) -> None:
    require_llama_cpp()
    adapter("llama", tmp_path, **settings)
    assert export_lora(tmp_path).check.agreement.kl_nats_per_token < 1e-6
    assert alpha_of(tmp_path / "x.gguf") != 0
    if alpha is not None:
        assert alpha_of(tmp_path / "x.gguf") == alpha


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["input_layernorm"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ],
)
def test_what_llama_cpp_cannot_apply_is_sent_to_the_merge(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    require_llama_cpp()
    adapter("llama", tmp_path, **settings)
    with pytest.raises(UserError, match=rf"cannot apply.*{reason}.*merge it instead"):
        export_lora(tmp_path)
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_of_embeddings_and_head_are_refused(target: str, tmp_path: Path) -> None:
    require_llama_cpp()
    adapter("llama", tmp_path, target_modules=["q_proj", target])
    with pytest.raises(UserError, match="applies no adapter on"):
        export_lora(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]


def test_a_square_matrix_the_wrong_way_round_is_found_by_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes cannot show it: A and B of GPT-2's attn.c_proj fit either way."""
    require_llama_cpp()
    adapter("gpt2", tmp_path, target_modules=["attn.c_proj"])
    read_pairs = gguf_export.read_pairs

    def turned(model: PeftModel) -> Any:
        pairs = read_pairs(model)
        return {n: type(p)(p.b.t(), p.a.t(), p.scale) for n, p in pairs.items()}

    monkeypatch.setattr(gguf_export, "read_pairs", turned)
    with pytest.raises(RunFailedError, match="computes something else from it"):
        export_lora(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]


@pytest.mark.parametrize("settings", [{"lora_alpha": 0}, {"b": 0.0}])
def test_an_adapter_that_does_nothing_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """llama.cpp would compute the same from its file and from none."""
    require_llama_cpp()
    adapter("llama", tmp_path, **settings)
    with pytest.raises(RunFailedError, match=r"moves its base by 0 nats a token.*was it trained"):
        export_lora(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]


def test_a_light_adapter_that_llama_cpp_ignores_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does is less than what arithmetic is granted, so that alone would pass."""
    require_llama_cpp()
    adapter("llama", tmp_path, b=1.3e-4)
    effect = export_lora(tmp_path).check.adapter_kl_nats_per_token
    assert effect is not None and 1e-6 < effect < 1e-5
    report = json.loads((tmp_path / "x.gguf.report.json").read_text())
    assert report["check"]["adapter_kl_nats_per_token"] == effect
    for made in tmp_path.glob("x.gguf*"):
        made.unlink()
    read_pairs = gguf_export.read_pairs

    def without(model: PeftModel) -> Any:
        return {n: type(p)(p.a, 0 * p.b, p.scale) for n, p in read_pairs(model).items()}

    monkeypatch.setattr(gguf_export, "read_pairs", without)
    with pytest.raises(RunFailedError, match="it is not applied"):
        export_lora(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]


def test_the_effect_is_the_divergence_of_base_and_adapter(tmp_path: Path) -> None:
    require_llama_cpp()
    adapter("llama", tmp_path)
    found = export_lora(tmp_path).check.adapter_kl_nats_per_token
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    windows = text_windows(AutoTokenizer.from_pretrained(tmp_path / "model"), None, 4, 128)
    with torch.no_grad():
        q = base(windows).logits.log_softmax(-1)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        p = adapted(windows).logits.log_softmax(-1)
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_the_alpha_of_a_file_is_never_0() -> None:
    """A 0 would mean that llama.cpp applies no scale at all."""
    pairs = {"m": Pair(torch.ones(3, 4), torch.ones(5, 3), 0.0)}
    assert common_alpha(pairs) == 1.0
