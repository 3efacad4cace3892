"""Whether memory has room for the weights of a model, known from the headers of its files."""

import psutil
import torch

from swlora.disk_space import size
from swlora.errors import UserError
from swlora.memory import available_bytes

# Bytes of a number in blocks of 32 and of 256 (llama.cpp's ggml-common.h)
GGUF_BYTES = {"Q8_0": 34 / 32, "Q4_K": 144 / 256}


def check_weights_fit(name: str, n_numbers: int, dtype: torch.dtype) -> None:
    """Raise UserError where so many numbers do not fit into memory and swap; it says what would."""
    needed, free = n_numbers * dtype.itemsize, available_bytes() + psutil.swap_memory().free
    if needed <= free:
        return
    forms = [("--dtype bfloat16", 2.0)] if dtype == torch.float32 else []
    forms += [(f"{kind} in a .gguf file", n_bytes) for kind, n_bytes in GGUF_BYTES.items()]
    fits = [f"{form} ({size(n_numbers * n)})" for form, n in forms if n_numbers * n <= free]
    raise UserError(
        f"the weights of {name} take {size(needed)} in {str(dtype).removeprefix('torch.')}, and "
        f"{size(free)} of memory are free; "
        + (f"what would fit: {' or '.join(fits)}" if fits else "not even 4 bits a weight would fit")
    )
