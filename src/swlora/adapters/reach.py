"""What an adapter changes: whether the fast forwards cover it, and whether it can be switched.

Adapters come from elsewhere too. The engine's own forwards and losses cover what is trained here:
adapters of the blocks' projections. Everything else that PEFT can run is left to PEFT and
transformers; what they would not measure correctly either is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from swlora.adapters.base_model import base_model_of
from swlora.adapters.methods import adapted_modules
from swlora.models.anatomy import Anatomy

FAST_TYPES = frozenset({"LORA", "ADALORA", "SUPERTUNING"})
# Virtual tokens before the text, other attention modules, or a choice between adapters.
NO_CHANGE_OF_WEIGHTS = frozenset(
    {
        *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"),
        *("ADAPTION_PROMPT", "XLORA", "POLY"),
    }
)
# Starts that leave the model's own weights alone.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def refusal(config: Mapping[str, Any]) -> str | None:
    """Say why an adapter with this adapter_config.json is not run at all; None if it is."""
    kind = str(config.get("peft_type"))
    if kind not in NO_CHANGE_OF_WEIGHTS:
        return None
    return f"its type is {kind}, which is no change of the model's weights"


def switch_refusal(config: Mapping[str, Any]) -> str | None:
    """Say why an adapter cannot be on for one request and off for the next; None if it can.

    What would change the base model itself is refused: other requests would see it.
    """
    if config.get("peft_type") != "LORA":
        return f"its type is {str(config.get('peft_type'))[:40]}, and only LORA is served"
    if config.get("bias", "none") != "none":
        return "it has biases of its own (bias)"
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        return "its start changed the model's own weights (init_lora_weights)"
    for name, what in (
        ("modules_to_save", "it replaces whole modules"),
        ("trainable_token_indices", "it replaces embeddings of tokens"),
        ("layer_replication", "it repeats layers"),
        ("alora_invocation_tokens", "it begins in the middle of a text"),
        ("target_parameters", "it adapts parameters that are no projections"),
        ("arrow_config", "it routes between adapters"),
        ("ensure_weight_tying", "it ties adapters to each other"),
    ):
        if config.get(name):
            return f"{what} ({name})"
    return None


def is_covered(model: Any) -> bool:
    """Say whether the engine's own forwards and losses serve a model in its present state.

    `model` is a causal language model, or a PeftModel of one: then all that is adapted must be
    projections of blocks, by methods that are trained here.
    """
    configs = getattr(model, "peft_config", None)
    if not configs or base_model_of(model) is model:
        return True
    if not all(_is_plain(config) for config in configs.values()):
        return False
    inside = {id(p.module) for p in Anatomy(base_model_of(model)).all_projections()}
    return all(id(module) in inside for module in adapted_modules(model).values())


def _is_plain(config: Any) -> bool:
    others = ("layer_replication", "alora_invocation_tokens", "arrow_config")
    return (
        str(getattr(config.peft_type, "value", config.peft_type)) in FAST_TYPES
        and getattr(config, "bias", "none") == "none"
        and not any(getattr(config, name, None) for name in others)
    )
