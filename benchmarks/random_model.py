"""Models of random bfloat16 numbers in real shapes, with the embedded model's tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import runner

# Of SmolLM2-360M, TinyLlama (its head tied, and with another vocabulary) and SmolLM2-1.7B
SHAPES: dict[str, dict[str, Any]] = {
    "0.36B": {
        **{"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32},
        **{"num_attention_heads": 15, "num_key_value_heads": 5, "tie_word_embeddings": True},
    },
    "1.1B": {
        **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": True},
    },
    "1.7B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": True},
    },
}
VOCABULARY, CONTEXT_TOKENS = 49152, 4096


def config_of(shape: dict[str, Any]) -> Any:
    """Return the configuration of a shape; what it does not say is as in SHAPES."""
    from transformers import AutoConfig

    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT_TOKENS}
    return AutoConfig.for_model("llama", **sizes | shape, dtype="bfloat16")


def write_model(folder: Path, shape: dict[str, Any], *, shard_gb: float = 2.0) -> Any:
    """Write a model of random bfloat16 numbers, a shard at a time; return it without content."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir()
    config = config_of(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(runner.builtin_model()).save_pretrained(folder)
    torch.manual_seed(0)
    weight_map, shard, n_shards = {}, dict[str, torch.Tensor](), 0
    for name, weight in [*model.named_parameters(), ("", None)]:
        n_bytes = sum(tensor.nbytes for tensor in shard.values())
        if weight is None or n_bytes + 2 * weight.numel() > shard_gb * 1e9:
            n_shards += 1
            file_name = f"model-{n_shards:05}.safetensors"
            save_file(shard, folder / file_name, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file_name)
            shard.clear()
        if weight is not None:
            is_norm = weight.dim() == 1
            values = torch.ones(weight.shape) if is_norm else torch.randn(weight.shape) * 0.02
            shard[name] = values.bfloat16()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model
