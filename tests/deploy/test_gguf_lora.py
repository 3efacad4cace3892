"""LoRA as GGUF: llama.cpp with the file computes what PEFT does, whatever PEFT's fields say."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from tests.support.gguf_models import save_tiny
from tests.support.llama_cpp import require_llama_cpp
from transformers import AutoModelForCausalLM

from swlora.config import ModelSpec
from swlora.deploy import gguf_export
from swlora.deploy.gguf_export import Exported, ExportRequest
from swlora.errors import RunFailedError, UserError
from swlora.progress import Silent

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

    B is large beside the model's weights, so that an adapter in the wrong order shows.
    """
    save_tiny(model_type, folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    known = ALL.get(model_type, ATTENTION if model_type in EXPERTS else LINEAR)
    kind = settings.pop("config_class", LoraConfig)
    sizes = {"init_r": 3, "target_r": 2, "total_step": 9} if kind is AdaLoraConfig else {"r": 3}
    settings = {"target_modules": known, **settings}
    config = kind(task_type="CAUSAL_LM", **sizes, **settings)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
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
        ({"lora_alpha": 0}, 1),
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
