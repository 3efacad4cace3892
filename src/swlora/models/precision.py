"""Whether this machine multiplies bfloat16 matrices natively, decided by a timed product.

CPUs without AVX512-BF16 or AMX emulate bfloat16 some forty times slower than float32; flags in
/proc/cpuinfo differ between systems, a stopwatch does not.
"""

import time
from functools import cache

import torch


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
    """Turn `auto` into CUDA, MPS or the CPU, whichever is there; other names are taken as given."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _product_s(dtype: torch.dtype, n: int = 512, repeats: int = 5) -> float:
    matrix = torch.ones(n, n, dtype=dtype)
    best_s = float("inf")
    for _ in range(repeats):
        start_s = time.perf_counter()
        matrix @ matrix
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s
