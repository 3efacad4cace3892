"""PEFT's configuration of an adapter that is to be served, made from what its file really holds.

The file's header says which modules it adapts and with which rank. Compared with the model first,
it costs no memory; and PEFT is given the names of modules, so that no expression from the adapter's
configuration is ever matched.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from swlora.adapters.patterns import check_patterns, matching_keys
from swlora.adapters.saved import CONFIG, WEIGHTS
from swlora.bounded_read import UnreadableError, read_json_object
from swlora.errors import UserError

PREFIX = "base_model.model."
PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
MAX_HEADER_BYTES = 32 << 20


def served_config(model: nn.Module, folder: Path) -> Any:
    """Return a LoraConfig that names every module and its rank; UserError where they do not fit.

    `model` may hold other adapters already.
    """
    from peft import LoraConfig

    try:
        config = read_json_object(folder / CONFIG)
    except UnreadableError as error:
        raise UserError(f"its {CONFIG} cannot be read: {error}") from error
    check_patterns(config)
    ranks = _ranks(model, _shapes(folder / WEIGHTS))
    _check_targets(config, ranks)
    alphas = {name: _of_module(config, "alpha_pattern", "lora_alpha", name) for name in ranks}
    for name, rank in ranks.items():
        if _of_module(config, "rank_pattern", "r", name) != rank:
            raise UserError(f"{name} has rank {rank}, and {CONFIG} says another")
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = model.get_submodule(next(iter(ranks)))
    return LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        target_modules=list(ranks),
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        lora_bias=bool(config.get("lora_bias")),
        fan_in_fan_out=isinstance(getattr(first, "base_layer", first), Conv1D),
    )


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file by their names, from its header."""
    from safetensors import safe_open

    try:
        with weights.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
        if n_header > MAX_HEADER_BYTES:
            raise UserError(f"the header of its {WEIGHTS} is too long")
        with safe_open(weights, "pt") as opened:
            names = list(opened.keys())
            return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except UserError:
        raise
    except Exception as error:  # of safetensors and the system
        raise UserError(f"its {WEIGHTS} cannot be read") from error


def _ranks(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the rank of every adapted module by its full name, first ones first."""
    ranks = {}
    for key, shape in shapes.items():
        for down, up in PAIRS:
            name, found, _ = key.removeprefix(PREFIX).partition(f".{down}")
            if not found or key == name:
                continue
            n_out, n_in = _sides(model, name)
            beside = shapes.get(key.replace(f".{down}", f".{up}"), ())
            rank = shape[0] if shape else 0
            if shape != (rank, n_in) or beside != (n_out, rank) or not 1 <= rank <= n_out + n_in:
                raise UserError(f"{name[:100]} has other shapes in it than this model")
            ranks[name] = rank
    if not ranks:
        raise UserError("it adapts nothing")
    return ranks


def _sides(model: nn.Module, name: str) -> tuple[int, int]:
    """Return (out, in) of the weight of a module; (width, tokens) of an embedding's."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"this model has no {name[:100]}") from None
    module = getattr(module, "base_layer", module)
    if not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        raise UserError(f"{name} is of the type {type(module).__name__}")
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _check_targets(config: Mapping[str, Any], modules: Mapping[str, int]) -> None:
    """Refuse a list of targets that other modules than its own were saved for."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return  # an expression, which the file answers
    for name in modules:
        if not any(name == target or name.endswith(f".{target}") for target in targets):
            raise UserError(f"it holds {name}, which is none of its target_modules")


def _of_module(config: Mapping[str, Any], pattern: str, default: str, name: str) -> Any:
    values = config.get(pattern) or {}
    value = next((values[key] for key in matching_keys(values, name)), config.get(default))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise UserError(f"its {CONFIG} gives {name[:100]} no number as {default}")
    return value
