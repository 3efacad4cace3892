"""Whether this machine multiplies bfloat16 matrices fast, decided by the processor's flags.

CPUs without such instructions emulate bfloat16 some forty times slower than float32. Intel's with
AVX-512 alone, where AMX is missing or hidden from a virtual machine, have them and multiply
bfloat16 at half of the rate of float32 (docs/decisions.md). A stopwatch would be fooled by other
programs: the same command would compute in another precision.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from swlora.errors import UserError
from swlora.plural import counted

# The instructions by which oneDNN multiplies bfloat16 matrices: x86; ARM, where Linux has oneDNN
_X86_FLAGS = ("avx512_bf16", "amx_bf16")
_ARM_FLAGS = ("bf16",) if sys.platform == "linux" else ()


def bfloat16_is_fast(device: torch.device | str = "cpu") -> bool:
    """Say whether torch multiplies bfloat16 matrices on a device faster than float32 ones."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not torch.backends.mkldnn.is_available():
        return False
    flags = _cpu_flags()
    names = _X86_FLAGS if flags.get("architecture") == "x86_64" else _ARM_FLAGS
    return any(flags.get(name, False) for name in names) and not _is_slower_than_float32(flags)


def _is_slower_than_float32(flags: Mapping[str, Any]) -> bool:
    """Say whether this is an Intel processor made for AMX (those have AVX512-FP16) without it."""
    is_intel = "Intel" in flags.get("cpu_name", "")
    return is_intel and bool(flags.get("avx512_fp16")) and not flags.get("amx_bf16")


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """Turn `auto`, `float32` or `bfloat16` into a torch dtype for a device."""
    if name == "auto":
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def resolve_device(name: str) -> torch.device:
    """Turn `auto` into CUDA where it is there, else the CPU.

    Raises UserError for a device that this machine does not have.
    """
    if name != "auto":
        return _present(torch.device(name))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters in place as loading in `dtype` would.

    Buffers are left alone: rotary frequencies stay float32, in which `model.to` loses them.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _present(device: torch.device) -> torch.device:
    n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= n_devices:
        raise UserError(
            f"--device {device}: this machine has {counted(n_devices, f'{device.type} device')}; "
            "use auto or cpu"
        )
    return device


def _cpu_flags() -> Mapping[str, Any]:
    """Return the processor's capabilities by name, and its "architecture"."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {  # torch 2.10
        "architecture": "x86_64",
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }
