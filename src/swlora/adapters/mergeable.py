"""Whether an adapter can be added to a model's weights, by what adapter_config.json says.

A field that is not known here and is set is refused: to leave it out could make another model than
the one that was trained.
"""

from collections.abc import Mapping
from typing import Any

from swlora.adapters.reach import HARMLESS_STARTS

MERGED_TYPES = ("LORA", "ADALORA", "SUPERTUNING")
EXACT_START = "pissa"  # of singular values: the same wherever it is computed
# What says where an adapter sits or how it was trained; its tensors show the result.
_PLACES = frozenset(
    {
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "trainable_token_indices", "fan_in_fan_out", "bias", "lora_bias"),
    }
)
_SIZES = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"})
_TRAINING = frozenset(
    {
        *("lora_dropout", "inference_mode", "runtime_config", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
        *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"),
        *("orth_reg_weight", "total_step", "sparsity", "select_top", "init_weights"),
        *("save_precomputed_indices", "init_lora_weights"),
    }
)
_NAMES = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version"),
        *("base_model_name_or_path", "revision"),
    }
)
_KNOWN = _PLACES | _SIZES | _TRAINING | _NAMES
_REASONS = {
    "layer_replication": "it repeats layers",
    "target_parameters": "it adapts parameters that are no projections",
    "alora_invocation_tokens": "it begins in the middle of a text",
    "arrow_config": "it routes between adapters",
    "ensure_weight_tying": "it ties adapters of embeddings and head to each other",
}


def merge_refusal(config: Mapping[str, Any]) -> str | None:
    """Say why an adapter with this adapter_config.json is not merged; None if it is."""
    kind = str(config.get("peft_type"))[:40]
    if kind not in MERGED_TYPES:
        return f"its type is {kind}, and only {', '.join(MERGED_TYPES)} are merged"
    start = config.get("init_lora_weights", True)
    if start not in (*HARMLESS_STARTS, EXACT_START):
        return (
            f"its start (init_lora_weights: {str(start)[:40]}) took a part out of the model's own "
            "weights that cannot be computed again; save it in PEFT with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    for name, value in sorted(config.items()):
        if name not in _KNOWN and value not in (None, False, [], {}):
            what = _REASONS.get(name, "it has a setting that is not known here")
            return f"{what} ({name[:60]})"
    return None
