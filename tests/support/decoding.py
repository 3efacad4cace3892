"""What tests of the decoders share: families and shapes, prompts, and the oracle."""

import random
from typing import Any

import torch

from swlora.models.anatomy import FAMILIES

EOS, N_TOKENS = 257, 256
WINDOW = {"sliding_window": 7}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        model_type: (model_type, {})
        for family in FAMILIES
        if family.has_attention_interface
        for model_type in family.model_types
    },
    "gpt2, scores scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "llama, one key head, biases": (
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "mistral, window": ("mistral", WINDOW),
    "phi3, window": ("phi3", WINDOW),
    "qwen2, one full layer": (
        "qwen2",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "gemma2, window": ("gemma2", {**WINDOW, "num_hidden_layers": 4}),
    "gemma3, window": ("gemma3_text", {**WINDOW, "num_hidden_layers": 6}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.3}),
    "smollm3, rope on some layers": ("smollm3", {"no_rope_layer_interval": 2}),
    "opt, norms behind, narrow embeddings": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
    ),
    "gpt_neox, not parallel": ("gpt_neox", {"use_parallel_residual": False}),
}


def make_prompts(seed: int = 0) -> list[list[int]]:
    """Lengths from one token to longer than a stretch; shared beginnings; one prompt twice."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(N_TOKENS) for _ in range(n)] for n in (5, 1, 40, 13, 70, 3)]
    return [*prompts, [*prompts[2][:20], 7, 8], prompts[2], prompts[2][:20]]


def alone(model: Any, prompt: list[int], n_new: int, **config: Any) -> list[int]:
    """What transformers generates for this prompt by itself, without the end-of-sequence."""
    from transformers import GenerationConfig

    setting = {"eos_token_id": EOS, "pad_token_id": EOS, "do_sample": False} | config
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        generation_config=GenerationConfig(max_new_tokens=n_new, **setting),
    )
    return [token for token in out[0, len(prompt) :].tolist() if token != EOS]
