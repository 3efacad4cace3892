"""Files of every family, in float32: what llama.cpp computes from them, what transformers reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.gguf_models import GEMMA, LONG, TEXTS, YARN, export_tiny
from tests.support.llama_cpp import require_llama_cpp
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from swlora.deploy.gguf_layout import GGUF_FAMILIES, gguf_family
from swlora.deploy.gguf_types import encoded
from swlora.deploy.llama_cpp import Question, ask
from swlora.errors import UnknownFamilyError, UserError
from swlora.models.gguf_header import read_gguf_table

# llama.cpp has the GELU in a table of float16
GELU = ("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "falcon")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


CASES: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in GGUF_FAMILIES),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", rope(**LLAMA3)),
    ("llama", rope(rope_type="linear", factor=2.0)),
    ("qwen2", rope(**YARN)),
    ("phi3", rope(**LONG, partial_rotary_factor=1.0)),
    ("gemma3_text", {"rope_parameters": GEMMA}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("olmo", {"clip_qkv": 0.5}),
]


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_llama_cpp_computes_what_transformers_does(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    llama_cpp = require_llama_cpp()
    model, whole = export_tiny(model_type, tmp_path, **changes)
    token_ids = whole[:40]
    asked = Question(tmp_path / "x.gguf", texts=[TEXTS], sequences=[token_ids], threads=1)
    answer = ask(llama_cpp, asked)
    expected = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    limit = 4e-3 if model_type in GELU else 3e-5
    torch.testing.assert_close(answer.log_probabilities[0], expected, atol=limit, rtol=0)
    assert answer.tokens[0] == whole
    assert (answer.bos, answer.eos, answer.add_bos) == (262, 263, False)


READ_BACK = [name for name, family in GGUF_FAMILIES.items() if family.is_read_back]


@pytest.mark.parametrize("model_type", READ_BACK)
def test_transformers_reads_the_same_weights_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    model, expected = export_tiny(model_type, tmp_path)
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        config=model.config,  # what it makes of the metadata leaves out much, such as head_dim
        gguf_file="x.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    found = back.state_dict()
    for name, weight in model.state_dict().items():
        if GGUF_FAMILIES[model_type].adds_one and name.endswith("norm.weight"):
            # 1 + w is what the file has, rounded to float32
            assert torch.equal(found[name], (weight + 1) - 1), name
        else:
            assert torch.equal(found[name], weight), name
    token_ids = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")(TEXTS).input_ids
    assert token_ids == expected


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("gemma2", {"query_pre_attn_scalar": 9}, "scales attention by 8"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3}, "windows of attention"),
        ("qwen2", {"head_dim": 8}, "heads of another size"),
        ("llama", {"hidden_act": "relu"}, "with silu, not with relu"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "every fourth"),
        ("falcon", {"alibi": True}, "alibi"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen2", rope(**YARN, attention_factor=2.0), "YaRN"),
    ],
)
def test_what_llama_cpp_has_otherwise_is_refused(
    model_type: str, changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        export_tiny(model_type, tmp_path, **changes)


def test_no_name_is_written_by_which_transformers_errs(tmp_path: Path) -> None:
    export_tiny("llama", tmp_path, name="mistral")
    assert read_gguf_table(tmp_path / "x.gguf").facts["general.name"] == "Mistral"


def test_a_family_that_llama_cpp_lacks_is_refused_by_name() -> None:
    with pytest.raises(UnknownFamilyError, match=r"no models of type 'opt'.*: falcon, gemma"):
        gguf_family("opt")


def test_numbers_that_no_type_holds_are_refused() -> None:
    with pytest.raises(UserError, match="beyond float16; use --type bf16"):
        encoded("w", torch.tensor([7e4]), "f16")
    with pytest.raises(UserError, match="not finite"):
        encoded("w", torch.tensor([torch.nan]), "f32")
