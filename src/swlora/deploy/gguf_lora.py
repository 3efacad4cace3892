"""A LoRA alone as a GGUF file, for `llama-server --lora` and Ollama's ADAPTER.

    y += alpha / rank  B A x    rank: the rows of A, pair by pair; alpha: one number for the file

A and B go in as PEFT has them (GPT-2's too: nothing is transposed), but for the rows of B, which
follow those of the weight. What another scale than alpha / rank needs is folded into B.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from swlora.adapters.adapted import NAME
from swlora.adapters.reach import switch_refusal
from swlora.deploy.export_request import TypeName
from swlora.deploy.gguf_layout import GgufLayout
from swlora.deploy.gguf_types import encoded
from swlora.errors import UserError

ALPHA = "adapter.lora.alpha"
_RANK_EPSILON = 1e-5  # of PEFT's AdaLoRA


@dataclass(frozen=True)
class Pair:
    """A (rank, in), B (out, rank) and the factor on their product, all of one module."""

    a: Tensor
    b: Tensor
    scale: float


def lora_refusal(config: Mapping[str, Any]) -> str | None:
    """Say why llama.cpp cannot apply an adapter with this adapter_config.json; None if it can."""
    if config.get("use_dora"):
        return "it is DoRA, whose norms depend on the weights (use_dora)"
    if config.get("lora_bias"):
        return "it has biases of its own (lora_bias)"
    if config.get("peft_type") == "ADALORA":
        return switch_refusal({**config, "peft_type": "LORA"})
    reason = switch_refusal(config)
    return reason and reason.replace("and only LORA is served", "and llama.cpp applies LoRA alone")


def read_pairs(peft_model: Any) -> dict[str, Pair]:
    """Return the pairs of a loaded LoRA or AdaLoRA by the full names of their modules.

    Raises UserError for an adapter on anything but linear maps.
    """
    from peft.tuners.lora import LoraLayer

    pairs = {}
    for name, module in peft_model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or NAME not in module.scaling:
            continue
        if NAME in module.lora_embedding_A:
            raise UserError(f"llama.cpp applies no adapter on embeddings ({name})")
        pairs[name] = _pair(module)
    return {name: pair for name, pair in pairs.items() if len(pair.a)}


def _pair(module: Any) -> Pair:
    a, b = module.lora_A[NAME], module.lora_B[NAME]
    if NAME not in getattr(module, "lora_E", {}):
        return Pair(a.weight.detach(), b.weight.detach(), float(module.scaling[NAME]))
    scale = float(module.scaling[NAME]) / (float(module.ranknum[NAME]) + _RANK_EPSILON)
    return Pair((a * module.lora_E[NAME]).detach(), b.detach(), scale)


def write_lora(
    layout: GgufLayout, pairs: Mapping[str, Pair], path: Path, kind: TypeName, name: str
) -> None:
    """Write pairs to a GGUF file; UserError where one has no place in llama.cpp."""
    import gguf

    head = ("lm_head", "embed_out")
    if on_head := [module for module in pairs if module in head]:
        raise UserError(f"llama.cpp applies no adapter on the head ({on_head[0]})")
    alpha = common_alpha(pairs)
    writer = gguf.GGUFWriter(path, layout.family.arch)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_name(name)
        writer.add_float32(ALPHA, alpha)
        raw = gguf.GGMLQuantizationType[kind.upper()]
        for module, pair in pairs.items():
            place = layout.place(f"{module}.weight")
            b = pair.b.float() * (pair.scale * len(pair.a) / alpha)
            if place.rows is not None:
                b = b[place.rows]
            for part, tensor in (("lora_a", pair.a), ("lora_b", b)):
                full = f"{place.name}.{part}"
                values = encoded(full, tensor, kind)
                writer.add_tensor(full, values, raw_shape=values.shape, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def common_alpha(pairs: Mapping[str, Pair]) -> float:
    """Return the alpha that most pairs need, a float32 that is not 0: that would mean no scale."""
    needed = Counter(float(np.float32(pair.scale * len(pair.a))) for pair in pairs.values())
    return next((alpha for alpha, _ in needed.most_common() if alpha), 1.0)
