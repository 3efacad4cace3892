"""What a GGUF file says of a model beside its weights and its tokenizer.

llama.cpp has parts of some families written into its code, such as which layers of a Gemma look at
a window only. A model that differs there is refused by name: its file would load and compute
something else.
"""

import math
from typing import Any

import torch
from torch import Tensor

from swlora.deploy.gguf_layout import falcon_kv_heads
from swlora.errors import UserError
from swlora.models.gguf_config import gemma_query_scalar
from swlora.models.gguf_rope import head_dim, llama3_factors, n_rotated, rope_of

# llama.cpp has one of them, the tanh form, from a table in float16; they differ by up to 0.001
GELU_NAMES = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def write_hyperparameters(writer: Any, config: Any) -> None:
    """Add what llama.cpp needs to know of a model to a `gguf.GGUFWriter`.

    Raises UserError for what llama.cpp cannot compute as transformers does.
    """
    for check in (_check_activation, _check_windows, _check_scales, _check_details):
        check(config)
    kind, heads = config.model_type, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    writer.add_context_length(context_tokens(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_feed_forward(config))
    writer.add_head_count(heads)
    writer.add_head_count_kv(falcon_kv_heads(config) if kind == "falcon" else kv_heads)
    writer.add_vocab_size(config.vocab_size)
    _write_norm(writer, config)
    if kind != "gpt2":
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
        _write_rope(writer, config)
    _write_own(writer, config)


def context_tokens(config: Any) -> int:
    """Return the longest text that llama.cpp treats as transformers does."""
    longest = int(getattr(config, "max_position_embeddings", None) or config.n_positions)
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "phi3", "mixtral") and window:  # it looks at all of a text
        return min(longest, int(window))
    return longest


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Return tensors that no weight of the model is: factors of rotary frequencies, float32."""
    parameters = rope_of(config)
    if parameters["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_factors(config)}
    if parameters["rope_type"] == "longrope":
        return {
            f"rope_factors_{which}.weight": torch.tensor(parameters[f"{which}_factor"])
            for which in ("long", "short")
        }
    return {}


def _write_rope(writer: Any, config: Any) -> None:
    import gguf

    parameters = rope_of(config)
    kind = parameters["rope_type"]
    if local := (config.rope_parameters or {}).get("sliding_attention"):
        if local.get("rope_type", "default") != "default":
            raise UserError("llama.cpp scales no rotary positions of layers with a window")
        writer.add_rope_freq_base_swa(local["rope_theta"])
    writer.add_rope_dimension_count(n_rotated(config))
    writer.add_rope_freq_base(parameters["rope_theta"])
    if kind in ("default", "llama3", "dynamic"):  # dynamic: nothing up to the context's length
        return
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    elif kind == "yarn":
        _write_yarn(writer, config, parameters)
    elif kind == "longrope":
        original = _original_tokens(config, parameters)
        ratio = config.max_position_embeddings / original
        attention = parameters.get("attention_factor")
        if attention is None:
            attention = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(attention)
    else:
        raise UserError(f"rotary positions of the type {kind!r} are not known to llama.cpp")


def _write_yarn(writer: Any, config: Any, parameters: dict[str, Any]) -> None:
    import gguf

    own = ("attention_factor", "mscale", "mscale_all_dim")
    if any(parameters.get(name) is not None for name in own) or parameters.get("truncate") is False:
        raise UserError("this YaRN has settings of its own (attention_factor, mscale or truncate)")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(_original_tokens(config, parameters))
    if (fast := parameters.get("beta_fast")) is not None:
        writer.add_rope_scaling_yarn_beta_fast(fast)
    if (slow := parameters.get("beta_slow")) is not None:
        writer.add_rope_scaling_yarn_beta_slow(slow)


def _original_tokens(config: Any, parameters: dict[str, Any]) -> int:
    name = "original_max_position_embeddings"
    return int(
        parameters.get(name) or getattr(config, name, None) or config.max_position_embeddings
    )


def _feed_forward(config: Any) -> int:
    kind = config.model_type
    if kind == "gpt2":
        return int(config.n_inner or 4 * config.hidden_size)
    return int(config.ffn_hidden_size if kind == "falcon" else config.intermediate_size)


def _write_norm(writer: Any, config: Any) -> None:
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
        return
    for name in ("layer_norm_epsilon", "layer_norm_eps"):
        if (epsilon := getattr(config, name, None)) is not None:
            writer.add_layer_norm_eps(epsilon)
            return
    writer.add_layer_norm_eps(1e-5)  # OLMo's, which is in its code


def _write_own(writer: Any, config: Any) -> None:
    """Add what only some families have."""
    kind = config.model_type
    if kind == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if getattr(config, "clip_qkv", None) is not None:
        writer.add_clamp_kqv(config.clip_qkv)
    if kind in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    for name, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if (cap := getattr(config, name, None)) is not None:
            add(cap)
    n_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if n_experts:
        writer.add_expert_count(n_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if kind == "qwen3_moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _check_activation(config: Any) -> None:
    name = next(
        value
        for field in ("hidden_activation", "hidden_act", "activation_function", "activation")
        if (value := getattr(config, field, None)) is not None
    )
    expected: tuple[str, ...] = ("silu", "swish")
    if config.model_type.startswith(("gemma", "gpt", "falcon")):
        expected = GELU_NAMES
    if name not in expected:
        raise UserError(f"llama.cpp computes this family with {expected[0]}, not with {name}")


def _check_windows(config: Any) -> None:
    """Refuse layers that look at a window where llama.cpp has other ones do so."""
    kind, types = config.model_type, getattr(config, "layer_types", None) or []
    period = {"gemma2": 2, "gemma3_text": 6}.get(kind, 1)  # the last of so many sees everything
    expected = [(layer + 1) % period != 0 for layer in range(len(types))]
    if [name == "sliding_attention" for name in types] != expected:
        raise UserError(f"llama.cpp has windows of attention in other layers of a {kind} model")


def _check_scales(config: Any) -> None:
    """Refuse scales of attention that llama.cpp has not; it reads none from a file."""
    if config.model_type not in ("gemma2", "gemma3_text"):
        return
    scalar, needed = config.query_pre_attn_scalar, gemma_query_scalar(config)
    if scalar != needed:
        raise UserError(
            f"llama.cpp scales attention by {needed:g}, and query_pre_attn_scalar is {scalar:g}"
        )


def _check_details(config: Any) -> None:
    """Refuse what single families may have and llama.cpp has not."""
    for is_other, what in (
        (getattr(config, "alibi", False), "positions as slopes (alibi)"),
        (config.model_type == "falcon" and not config.parallel_attn, "no parallel attention"),
        (config.model_type == "falcon" and config.bias, "biases"),
        (getattr(config, "scale_attn_by_inverse_layer_idx", False), "scales of layers"),
        (not getattr(config, "scale_attn_weights", True), "unscaled attention"),
        (getattr(config, "use_bidirectional_attention", False), "attention to later tokens"),
        (config.model_type == "qwen3_moe" and not config.norm_topk_prob, "norm_topk_prob: false"),
        (config.model_type == "olmoe" and config.norm_topk_prob, "norm_topk_prob: true"),
        (_heads_differ(config), "heads of another size than hidden_size over their number"),
        (_keys_differ(config), "fewer heads of keys than of queries"),
        (_ropeless_differ(config), "other layers without rotary positions than every fourth"),
    ):
        if is_other:
            raise UserError(f"this {config.model_type} model has {what}, which llama.cpp has not")


def _heads_differ(config: Any) -> bool:
    fixed = ("qwen2", "olmo", "olmo2", "olmoe", "phi3")
    width = config.num_attention_heads * head_dim(config)
    return config.model_type in fixed and bool(width != config.hidden_size)


def _keys_differ(config: Any) -> bool:
    is_olmoe = config.model_type == "olmoe"
    return is_olmoe and bool(config.num_key_value_heads != config.num_attention_heads)


def _ropeless_differ(config: Any) -> bool:
    layers = getattr(config, "no_rope_layers", None)
    if not layers:
        return False
    return any(bool(has) != ((layer + 1) % 4 != 0) for layer, has in enumerate(layers))
