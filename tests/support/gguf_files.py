"""Tiny models as .gguf files, their weights changed as llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {"gemma3_text": "gemma3"}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
# Sizes of which rows are whole blocks of every type, and with what transformers reads from a file
SIZES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": WIDE,
    "qwen3": {**WIDE, "head_dim": 128},
    "gemma2": {**WIDE, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": WIDE,
    "phi3": {**WIDE, "vocab_size": 32064},  # its default padding token is the 32,000th
    "gpt2": {"n_embd": 256, "n_inner": 1024, "n_layer": 2, "n_positions": 1024},
}


def write_gguf(
    model: Any,
    tokenizer: Any,
    path: Path,
    leave_out: tuple[str, ...] = (),
    kind: str = "F32",
    seed: int = 0,
) -> None:
    """Write a model; its matrices as `kind`, of which those with K are random blocks."""
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    _write_sizes(writer, config)
    _write_tokenizer(writer, config, tokenizer)
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    kinds = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(seed)
    is_tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name in leave_out or (is_tied and name == "lm_head.weight"):
            continue
        array = _as_llama_cpp(name, tensor.numpy(), config)
        stored = names.get_name(name, (".weight", ".bias"))
        if array.ndim < 2 or kind == "F32" or "wpe" in name:
            writer.add_tensor(stored, array)
        elif kind.endswith("_K"):
            blocks = random_blocks(kinds, array.shape, rng)
            writer.add_tensor(stored, blocks, raw_dtype=kinds)
        else:
            writer.add_tensor(stored, gguf.quantize(array, kinds), raw_dtype=kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def change_metadata(path: Path, changes: dict[str, str | None]) -> None:
    """Write a file of float32 tensors anew with other texts in it; None leaves one out."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path.with_suffix(".new"), architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *changes):
            writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:2])
    for name, value in changes.items():
        if value is not None:
            writer.add_string(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


def random_blocks(kind: Any, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return valid blocks of any type with random content: rows of bytes."""
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    n_blocks = shape[0] * shape[1] // n_values
    blocks = rng.integers(0, 256, (n_blocks, n_bytes), dtype=np.uint8)
    scales = (rng.standard_normal((n_blocks, 2)) * 0.002).astype(np.float16).view(np.uint8)
    at = {"Q6_K": (208, 2), "Q8_0": (0, 2), "Q4_0": (0, 2), "Q5_0": (0, 2)}
    start, size = at.get(kind.name, (0, 4))  # d alone, or d and the minimum's scale behind it
    blocks[:, start : start + size] = scales[:, :size]
    return blocks.reshape(shape[0], -1)


def _as_llama_cpp(name: str, array: np.ndarray, config: Any) -> np.ndarray:
    if config.model_type == "llama":
        for part, n_heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:
                halves = array.reshape(n_heads, 2, -1, array.shape[1])
                return halves.swapaxes(1, 2).reshape(array.shape).copy()
    if config.model_type.startswith("gemma") and "norm" in name:
        return array + 1
    if config.model_type == "gpt2" and array.ndim == 2 and ("attn.c" in name or "mlp.c" in name):
        return array.T.copy()
    return array


def _write_sizes(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if head_dim := getattr(config, "head_dim", None):
        writer.add_rope_dimension_count(head_dim)
        writer.add_key_length(head_dim)


def _write_tokenizer(writer: Any, config: Any, tokenizer: Any) -> None:
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += ["<|endoftext|>"]  # which transformers would add
    tokens += [f"<unused{k}>" for k in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3 if t.startswith("<") and len(t) > 1 else 1 for t in tokens])
    writer.add_token_merges([])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
