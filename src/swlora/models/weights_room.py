"""Whether memory has room for the weights of a model, known from the headers of its files, and
whether a device has."""

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import AutoHfQuantizer

from swlora.disk_space import size
from swlora.errors import UserError
from swlora.library_noise import quiet_libraries
from swlora.memory import available_bytes, free_swap_bytes, is_out_of_memory
from swlora.models.weight_source import weight_files

# Bytes of a number in blocks of 32 and of 256 (llama.cpp's ggml-common.h)
GGUF_BYTES = {"Q8_0": 34 / 32, "Q4_K": 144 / 256}


def check_weights_fit(
    name: str, n_numbers: int, dtype: torch.dtype, packed_bytes: int | None = None
) -> None:
    """Raise UserError where so many numbers do not fit into memory and swap; it says what would.

    `packed_bytes` are those of weights that stay quantised.
    """
    free = available_bytes() + free_swap_bytes()
    needed, form = n_numbers * dtype.itemsize, f"in {str(dtype).removeprefix('torch.')}"
    if packed_bytes is not None:
        needed, form = packed_bytes, "as they lie in their files"
    if needed <= free:
        return
    is_wide = packed_bytes is None and dtype == torch.float32
    forms = [("--dtype bfloat16", 2.0)] if is_wide else []
    forms += [(f"{kind} in a .gguf file", n_bytes) for kind, n_bytes in GGUF_BYTES.items()]
    fits = [f"{other} ({size(n_numbers * n)})" for other, n in forms if n_numbers * n <= free]
    raise UserError(
        f"the weights of {name} take {size(needed)} {form}, and {size(free)} of memory are free; "
        + (f"what would fit: {' or '.join(fits)}" if fits else "not even 4 bits a weight would fit")
    )


def moved(model: Any, name: str, device: torch.device) -> Any:
    """Return a model on a device; UserError where its weights find no room there."""
    free = None
    try:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
        return model.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    needed = size(sum(parameter.nbytes for parameter in model.parameters()))
    there = "" if free is None else f", and {size(free)} are free there"
    smaller = " or --dtype bfloat16" if model.dtype == torch.float32 else ""
    raise UserError(
        f"the weights of {name} take {needed} and find no room on {device}{there}; give --device "
        f"cpu{smaller}, or see to it that other programs leave it more"
    )


def bytes_if_quantised(folder: Path, config: Any) -> int | None:
    """Return the bytes of a folder's weights where they stay quantised in memory; else None.

    transformers decides that by the kind of quantisation and by the machine: some kinds become
    whole numbers where no kernel for them is there.
    """
    packed = getattr(config, "quantization_config", None)
    if packed is None or not _stays(packed):
        return None
    return sum((folder / name).stat().st_size for name in weight_files(folder))


def _stays(packed: dict[str, Any]) -> bool:
    try:
        with quiet_libraries():
            if not AutoHfQuantizer.supports_quant_method(packed):
                return False  # the library takes them for plain numbers
            quantizer = AutoHfQuantizer.from_config(dict(packed), pre_quantized=True)
            quantizer.validate_environment(device_map=None)
    except Exception:  # of a package that is missing, for one: the library refuses the folder
        return True
    return not getattr(quantizer.quantization_config, "dequantize", False)
