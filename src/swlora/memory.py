"""The process's memory: kept instead of handed back after every tensor, few kernels, and its peak.

glibc maps and unmaps allocations of a few megabytes anew each time; a training step makes
thousands of them, and the page faults can cost more than the arithmetic. Two settings of its
allocator end that. Where the allocator is another one, nothing changes.

oneDNN makes a kernel for every shape of a product, in 0.4 ms, and keeps the last 1,024 of them; so
does torch's layer around it. Prefix trees and batches that shrink seldom have a shape again, and
what is kept grows to gigabytes.
"""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_MADV_DONTNEED = 4  # from sys/mman.h of Linux
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_KEEP_BYTES = 1 << 30
KERNELS_KEPT = 64  # a step needs about 25
_KERNEL_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_freed_memory() -> bool:
    """Let glibc serve allocations below 1 GiB from kept memory; say whether that took effect."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    return all([mallopt(setting, _KEEP_BYTES) == 1 for setting in settings])


def keep_few_kernels() -> None:
    """Let oneDNN keep KERNELS_KEPT kernels, where the user's environment does not say how many.

    Both limits are read at the first product; called later, it has no effect.
    """
    for name in _KERNEL_VARIABLES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


def release_pages(tensor: "Tensor") -> None:
    """Give back the memory of a tensor that is a view of a mapped file; it is read again if used.

    The tensor must be unchanged and contiguous: changes in pages of its own would be lost. Only
    whole pages that are wholly its own are given back, and on Linux alone; elsewhere the system
    takes them when it needs them.
    """
    if not sys.platform.startswith("linux"):
        return
    page, start = resource.getpagesize(), tensor.data_ptr()
    first, end = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if end <= first:
        return
    with suppress(OSError, AttributeError):  # another C library
        advise = ctypes.CDLL("libc.so.6").madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_DONTNEED)


def peak_memory_bytes(device_type: str) -> int:
    """Return the most memory held so far: by torch on CUDA, resident by this process elsewhere.

    Linux counts VmHWM anew for every program; getrusage there may tell the parent's instead.
    """
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
