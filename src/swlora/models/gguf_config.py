"""The configuration of transformers that a .gguf file describes.

transformers' tables (5.23) read the sizes of most families and leave out much of what else a file
says, for which its classes then have values of their own, those of one model. It is added here, and
what a file says and a class cannot have is refused by name.
"""

from pathlib import Path
from typing import Any

from swlora.errors import UserError
from swlora.library_noise import quiet_libraries
from swlora.models.gguf_header import GgufHeader, read_gguf_table
from swlora.models.gguf_rope import head_dim, read_rope_scaling

# Settings by their keys in a file, as far as a family's configuration has them
_SETTINGS = {
    "context_length": "max_position_embeddings",
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_WINDOWS = ("gemma2", "gemma3_text", "phi3")
# transformers 5.23 makes a MistralConfig of a llama file of exactly this name, and finds no weights
MISREAD_NAME = "mistral"
_LARGEST_GEMMAS = {"gemma2": 46, "gemma3_text": 62}  # layers of the 27B models


def read_gguf_config(path: Path) -> Any:
    """Return the configuration of a .gguf file.

    Raises UserError for a damaged file, and for one that says what no configuration can have; what
    transformers' own reader raises passes through.
    """
    from transformers import AutoConfig

    header = read_gguf_table(path)
    if header.facts.get("general.name") == MISREAD_NAME:
        raise UserError(
            f"{path} has general.name = {MISREAD_NAME}, by which transformers takes it for another "
            f"architecture; give it another one, with gguf's own script: gguf-new-metadata "
            f"--general-name Mistral {path.name} renamed.gguf"
        )
    with quiet_libraries():
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    facts = header.own_facts("")
    for key, name in _SETTINGS.items():
        if facts.get(key) is not None and hasattr(config, name):
            setattr(config, name, facts[key])
    if "tokenizer.ggml.padding_token_id" not in header.facts:
        config.pad_token_id = None  # Phi-3's default may be beyond the vocabulary
    kind = config.model_type
    if kind == "gpt2":
        config.n_inner = facts.get("feed_forward_length", config.n_inner)
    if kind in _WINDOWS and facts.get("attention.sliding_window"):
        config.sliding_window = facts["attention.sliding_window"]
    if kind in _LARGEST_GEMMAS:
        config.query_pre_attn_scalar = gemma_query_scalar(config)
    for name, tensor in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_up.bias")):
        if hasattr(config, name):
            setattr(config, name, f"blk.0.{tensor}" in header.tensors)
    _check_heads(path, config, facts)
    _set_rope(path, header, config, facts)
    return config


def gemma_query_scalar(config: Any) -> int:
    """Return what llama.cpp divides attention by the root of, in a Gemma; it is in no file."""
    if config.num_hidden_layers == _LARGEST_GEMMAS.get(config.model_type):
        return int(config.hidden_size // config.num_attention_heads)
    return head_dim(config)


def _check_heads(path: Path, config: Any, facts: dict[str, Any]) -> None:
    """Refuse heads of other sizes than the configuration has."""
    for key in ("attention.key_length", "attention.value_length"):
        if facts.get(key, head_dim(config)) != head_dim(config):
            raise UserError(
                f"{path} says {key} = {facts[key]}, and heads of a {config.model_type} model have "
                f"{head_dim(config)} numbers: it is not read"
            )


def _set_rope(path: Path, header: GgufHeader, config: Any, facts: dict[str, Any]) -> None:
    parameters = getattr(config, "rope_parameters", None)
    scaling = read_rope_scaling(path, header, config)
    if not parameters:
        return
    whole = parameters.get("full_attention", parameters)
    whole.update(scaling)
    if (base := facts.get("rope.freq_base")) is not None:
        whole["rope_theta"] = base
    if "sliding_attention" in parameters and (base := facts.get("rope.freq_base_swa")):
        parameters["sliding_attention"]["rope_theta"] = base
    rotated = facts.get("rope.dimension_count", head_dim(config))
    if rotated != head_dim(config):
        if "partial_rotary_factor" not in whole:
            raise UserError(
                f"{path} rotates {rotated} of the {head_dim(config)} numbers of a head, which "
                f"{config.model_type} models of transformers do not"
            )
        whole["partial_rotary_factor"] = rotated / head_dim(config)
    original = "original_max_position_embeddings"
    if original in scaling and hasattr(config, original):  # Phi-3's has it beside the others too
        setattr(config, original, scaling[original])
