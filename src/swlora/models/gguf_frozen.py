"""Models whose matrices stay as they lie in a .gguf file, mapped into memory and never copied.

The modules are transformers' own; each matrix is a `QuantisedWeight` over the file's bytes, or,
where the file has the wanted dtype, an ordinary weight over them. Norms and biases are dequantised.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swlora.config.model import KEPT_ABOVE_BYTES
from swlora.errors import UserError
from swlora.library_noise import quiet_libraries
from swlora.models.anatomy import family_of
from swlora.models.gguf_blocks import PLAIN, StoredMatrix, is_kept
from swlora.models.gguf_file import load_gguf, read_gguf_header
from swlora.models.gguf_weights import GgufWeights
from swlora.models.precision import cast_parameters
from swlora.models.quantised_weight import QuantisedWeight
from swlora.plural import counted

FAMILIES = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
)


def load_gguf_model(
    path: Path, frozen: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any, str]:
    """Return (model, tokenizer, how its weights are held) of a .gguf file; the last in words.

    `frozen` is what ModelSpec has: "gguf", "dequantised", or None for what suits the file.
    """
    if frozen == "gguf" and device.type != "cpu":
        raise UserError("--frozen gguf works on the CPU; leave it out, or give --device cpu")
    stays = frozen == "gguf"
    if frozen is None and device.type == "cpu" and path.stat().st_size > KEPT_ABOVE_BYTES:
        stays = read_gguf_header(path)[0].model_type in FAMILIES
    if stays:
        model, tokenizer, kinds = load_gguf_frozen(path, dtype)
        return model, tokenizer, f", its weights as they lie there ({kinds})"
    model, tokenizer = load_gguf(path)
    family_of(model.config.model_type)
    cast_parameters(model, dtype)
    return model, tokenizer, ""


def load_gguf_frozen(path: Path, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """Return (model, tokenizer, what was kept in words); its weights compute in `dtype`.

    Raises UserError where the file is unreadable, lacks a weight, or is of a family of which this
    was not tested.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config, tokenizer = read_gguf_header(path)
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--frozen gguf: weights of {config.model_type} models cannot stay as they lie in the "
            "file; give --frozen dequantised"
        )
    with quiet_libraries(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # as from_pretrained
    weights = GgufWeights(path, model)
    weights.check_all_read()
    kinds: Counter[str] = Counter()
    for name in weights.names:
        holder, _, part = name.rpartition(".")
        module = model.get_submodule(holder)
        weight = _weight(weights, name, module, dtype, kinds)
        module._parameters[part] = nn.Parameter(weight, requires_grad=False)
    model.tie_weights()
    if missing := sorted(name for name, p in model.named_parameters() if p.is_meta):
        raise UserError(f"{path} lacks {counted(len(missing), 'weight')}, such as {missing[0]}")
    return model, tokenizer, _in_words(kinds)


def _weight(
    weights: GgufWeights, name: str, module: nn.Module, dtype: torch.dtype, kinds: Counter[str]
) -> Tensor:
    """Return a weight of a module: over the file's bytes where that can be, else dequantised."""
    stored = weights.stored(name)
    if stored is None or len(stored.shape) != 2:
        return weights.tensor(name).to(dtype)
    order = weights.row_order(name)
    is_conv1d = order is None and isinstance(module, Conv1D)  # GPT-2's, transposed
    is_matrix = is_conv1d or order is not None
    kinds[stored.kind.name if is_matrix and is_kept(stored.kind) else "dequantised"] += 1
    if not (is_matrix and is_kept(stored.kind)):
        return weights.tensor(name).to(dtype)
    blocks = torch.from_numpy(weights.blocks(stored).view(np.uint8))
    if order is None or np.array_equal(order, np.arange(len(order))):
        if PLAIN.get(stored.kind) == dtype:
            plain = blocks.view(dtype)
            return plain.t() if is_conv1d else plain
        rows = None
    else:
        rows = torch.from_numpy(order)
    matrix = StoredMatrix(blocks, stored.kind, stored.shape[1], rows)
    return QuantisedWeight(matrix, dtype, is_transposed=is_conv1d)


def _in_words(kinds: Counter[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
