"""Models from a .gguf file, dequantised into ordinary float32 modules."""

from pathlib import Path
from typing import Any

from swlora.errors import UserError
from swlora.library_noise import quiet_libraries
from swlora.models.gguf_config import read_gguf_config
from swlora.models.gguf_reading import read_once
from swlora.models.gguf_tokenizer import read_gguf_tokenizer
from swlora.models.gguf_weights import GgufWeights
from swlora.plural import counted


@read_once()
def load_gguf(path: Path) -> tuple[Any, Any]:
    """Return (model in float32, tokenizer) of a .gguf file; UserError where it is unreadable."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    config, tokenizer = read_gguf_header(path)
    try:
        with quiet_libraries():
            model, report = AutoModelForCausalLM.from_pretrained(
                path.parent,
                config=config,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),  # else it fetches a kernel
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise _unreadable(path, error) from error
    if missing := sorted(report["missing_keys"]):  # transformers would fill them at random
        raise UserError(f"{path} lacks {counted(len(missing), 'weight')}, such as {missing[0]}")
    GgufWeights(path, model).check_all_read()
    return model, tokenizer


@read_once()
def read_gguf_header(path: Path) -> tuple[Any, Any]:
    """Return (configuration, tokenizer) of a .gguf file without reading its weights.

    Raises UserError where it is unreadable.
    """
    try:
        return read_gguf_config(path), read_gguf_tokenizer(path)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    detail = " ".join(str(error).split())[:200]
    return UserError(f"{path} cannot be read as a GGUF language model: {detail}")
