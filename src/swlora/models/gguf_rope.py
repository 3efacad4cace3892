"""Rotary positions of a .gguf file and of a configuration: which frequencies, and how scaled.

transformers' tables (5.23) read the base frequency alone. The scalings that many files have are
read here into `rope_parameters`: Llama 3's, of which a file holds the factors and not what they
were made from, linear ones, YaRN and Phi-3's long and short factors. Any other is refused: without
it the file would be another model, in silence.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swlora.errors import UserError
from swlora.models.gguf_header import GgufHeader

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# What Llama 3.1 (factor 8) and 3.2 (factor 32) were made with
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_FACTORS = (8.0, 32.0)
_ROUNDING = 1e-5  # relative: of float32, in which the factors were computed
_LLAMAS = ("llama", "mistral")


def head_dim(config: Any) -> int:
    """Return the size of an attention head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary settings of the layers that look at all of a text; the type if unset."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    return {"rope_type": "default", **parameters}


def n_rotated(config: Any) -> int:
    """Return how many numbers of an attention head are rotated."""
    return int(head_dim(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def llama3_factors(config: Any) -> Tensor:
    """Return what Llama 3's scaling divides each frequency by: float32 (rotated / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    powers = torch.arange(0, n_rotated(config), 2, dtype=torch.float32) / n_rotated(config)
    factors: Tensor = (1.0 / rope_of(config)["rope_theta"] ** powers) / scaled.float()
    return factors


def read_rope_scaling(path: Path, header: GgufHeader, config: Any) -> dict[str, Any]:
    """Return what `rope_parameters` gets from a file beside its base frequency; {} for no scaling.

    config: what the file says else. Raises UserError for a scaling that is not read exactly.
    """
    facts = header.own_facts("rope.scaling.")
    facts.pop("finetuned", None)  # how it was trained: nothing is computed with it
    factor = facts.get("factor", header.own_facts("rope.").get("scale_linear"))
    tensors = {name for name in header.tensors if name.startswith(("rope_freqs", "rope_factors"))}
    kind = facts.get("type")
    if kind is None and factor not in (None, 0.0, 1.0):
        kind = "linear"  # so llama.cpp has it
    if kind in (None, "none") and not tensors:
        return {}
    found = None
    if kind in (None, "none") and tensors == {FREQS} and config.model_type in _LLAMAS:
        found = _known_llama3(path, header, config)
    elif kind in (None, "none", "longrope") and tensors == {LONG, SHORT}:
        found = _longrope(path, header, facts)
    elif kind == "linear" and not tensors and factor and facts.keys() <= {"type", "factor"}:
        found = {"rope_type": "linear", "factor": float(factor)}
    elif kind == "yarn" and not tensors and factor:
        found = _yarn(float(factor), facts)
    if found is None:
        what = f"{kind} scaling" if kind not in (None, "none") else min(tensors)
        raise UserError(
            f"{path} scales its rotary frequencies in a way that is not read from GGUF files "
            f"({what}): give --model the safetensors model that it was made of"
        )
    return found


def _known_llama3(path: Path, header: GgufHeader, config: Any) -> dict[str, Any] | None:
    """Return the settings of Llama 3 that give the file's factors; None where none do."""
    factors = _tensor(path, header, FREQS)
    for factor in LLAMA3_FACTORS:
        tried = copy.deepcopy(config)
        settings = {**LLAMA3, "factor": factor}
        tried.rope_parameters = {**rope_of(config), **settings}
        expected = llama3_factors(tried)
        if expected.shape == factors.shape and torch.allclose(factors, expected, _ROUNDING, 0.0):
            return settings
    return None


def _longrope(path: Path, header: GgufHeader, facts: dict[str, Any]) -> dict[str, Any] | None:
    original = facts.get("original_context_length")
    if original is None or facts.keys() - {"type", "original_context_length", "attn_factor"}:
        return None
    return {
        "rope_type": "longrope",
        "long_factor": _tensor(path, header, LONG).tolist(),
        "short_factor": _tensor(path, header, SHORT).tolist(),
        "original_max_position_embeddings": int(original),
        "attention_factor": float(facts.get("attn_factor", 1.0)),
    }


def _yarn(factor: float, facts: dict[str, Any]) -> dict[str, Any] | None:
    names = {
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    if "original_context_length" not in facts or facts.keys() - names - {"type", "factor"}:
        return None
    own = {names[key]: value for key, value in facts.items() if key in names}
    return {"rope_type": "yarn", "factor": factor, **own}


def _tensor(path: Path, header: GgufHeader, name: str) -> Tensor:
    from gguf import dequantize

    stored = header.tensors[name]
    raw = np.fromfile(path, dtype=np.uint8, count=stored.n_bytes, offset=stored.start)
    return torch.from_numpy(dequantize(raw, stored.kind).copy()).view(-1)
