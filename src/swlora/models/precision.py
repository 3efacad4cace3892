"""Whether this machine multiplies bfloat16 matrices natively, decided by a timed product.

CPUs without AVX512-BF16 or AMX emulate bfloat16 some forty times slower than float32; flags in
/proc/cpuinfo differ between systems, a stopwatch does not.
"""

import time
from functools import cache

import torch
from torch import nn

from swlora.errors import UserError


@cache
def bfloat16_is_native(device_type: str = "cpu") -> bool:
    """Say whether a bfloat16 matrix product on `device_type` beats the float32 one."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if device_type != "cpu":
        return False
    return _product_s(torch.bfloat16) < _product_s(torch.float32)


def resolve_dtype(name: str, device_type: str) -> torch.dtype:
    """Turn `auto`, `float32` or `bfloat16` into a torch dtype for `device_type`."""
    if name == "auto":
        return torch.bfloat16 if bfloat16_is_native(device_type) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def resolve_device(name: str) -> torch.device:
    """Turn `auto` into CUDA, MPS or the CPU, whichever is there.

    Raises UserError for a device that this machine does not have.
    """
    if name != "auto":
        return _present(torch.device(name))
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters in place as loading in `dtype` would.

    Buffers are left alone: rotary frequencies stay float32, in which `model.to` loses them.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _present(device: torch.device) -> torch.device:
    n_devices = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 1)
    if (device.index or 0) >= n_devices:
        raise UserError(
            f"--device {device}: this machine has {n_devices} {device.type} devices; "
            "use auto or cpu"
        )
    return device


def _product_s(dtype: torch.dtype, n: int = 512, repeats: int = 5) -> float:
    matrix = torch.ones(n, n, dtype=dtype)
    best_s = float("inf")
    for _ in range(repeats):
        start_s = time.perf_counter()
        matrix @ matrix
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s
