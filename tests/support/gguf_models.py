"""Tiny models of every family that a GGUF file is made of, and a tokenizer for llama.cpp."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.conftest import CHAT_TEMPLATE, N_EMBEDDINGS, TINY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from swlora.deploy.export_request import TypeName
from swlora.deploy.gguf_write import ModelParts, write_gguf
from swlora.models.weight_source import open_weights
from swlora.progress import Silent

N_MERGES = N_EMBEDDINGS - 258
TEXTS = "the then there 12 123 it's they're day  two\n\nlines héllo the then the then"
# Shapes and settings under which llama.cpp computes what transformers does
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "falcon": {"multi_query": True},
    **{name: {"head_dim": 6} for name in ("qwen2", "olmo", "olmo2", "phi3")},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_neox": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.7}},
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": []},
}
# Scalings of rotary positions
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.3, 2.0],
    "long_factor": [2.0, 3.0, 4.0],
    "original_max_position_embeddings": 128,
}
GEMMA = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}


def bpe_tokenizer(
    bos: str = "<s>", eos: str = "</s>", template: str = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Return byte-level BPE with six merges; BOS and EOS are the last two tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=N_EMBEDDINGS - 2, initial_alphabet=sorted(alphabet), show_progress=False
    )
    core.train_from_iterator([TEXTS], trainer)
    core.add_special_tokens([bos, eos])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, chat_template=template
    )


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Return a random model whose norms are no ones and whose biases are no zeros."""
    settings = TINY[model_type] | CHANGES.get(model_type, {}) | changes
    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save_tiny(model_type: str, folder: Path, **changes: Any) -> Any:
    """Save a tiny model and its tokenizer to a folder; return the model."""
    model = tiny_model(model_type, **changes)
    model.save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return model


def add_old_buffers(folder: Path) -> None:
    """Put into a GPT-NeoX's file what older versions of transformers saved, as Pythia's files have.

    The weights are float16 then, in which the number for masked places is -inf.
    """
    path = folder / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
    for name in [name for name in tensors if name.endswith("attention.dense.bias")]:
        attention = name.removesuffix(".dense.bias")
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9).half()
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, path, {"format": "pt"})


def export_tiny(
    model_type: str, folder: Path, kind: TypeName = "f32", name: str = "tiny", **changes: Any
) -> tuple[Any, list[int]]:
    """Write folder/x.gguf of a tiny model of that name; return the model and its tokens of TEXTS.

    A family's own tokenizer cuts words in its own way, whatever the saved one did.
    """
    model = save_tiny(model_type, folder / "model", **changes)
    config = AutoConfig.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    parts = ModelParts(config, tokenizer, open_weights(folder / "model"), model.generation_config)
    write_gguf(parts, folder / "x.gguf", kind, name, Silent())
    return model, tokenizer(TEXTS).input_ids
