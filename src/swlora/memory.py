"""The process's memory: kept instead of handed back after every tensor, few kernels, its peak, and
what the steps of a training and copies of weights may take of it, and whether it ran out.

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from swlora.cgroup import memory_left_bytes, swap_left_bytes
from swlora.processes import world

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MADV_DONTNEED = 4  # from sys/mman.h of Linux
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
FREE_SHARE = 0.75
_asked_bytes: int | None = None  # of --memory-gb
_free_bytes: int | None = None  # for steps and copies, where nothing was asked for
_steps_bytes: int | None = 0
_worth_bytes: int | None = None
KERNELS_KEPT = 64  # a step needs about 25
_KERNEL_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_freed_memory(below_bytes: int = 1 << 30) -> bool:
    """Let glibc serve smaller allocations from kept memory; say whether that took effect.

    Larger ones are given back as soon as they are free.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    return all([mallopt(setting, below_bytes) == 1 for setting in settings])


def keep_few_kernels() -> None:
    """Let oneDNN keep KERNELS_KEPT kernels, where the user's environment does not say how many.

    Both limits are read at the first product; called later, it has no effect.
    """
    for name in _KERNEL_VARIABLES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


def release_pages(tensors: Iterable["Tensor"]) -> None:
    """Give back the memory of tensors that are views of mapped files; used again, it is read again.

    They must be unchanged and contiguous: changes are lost. Memory that is no file's is left alone.
    Only whole pages are given back, and on Linux alone; elsewhere the system takes them back when
    it needs them.
    """
    if not sys.platform.startswith("linux"):
        return
    page, files = resource.getpagesize(), _mapped_files()
    with suppress(OSError, AttributeError):  # another C library
        advise = ctypes.CDLL("libc.so.6").madvise
        for tensor in tensors:
            start = tensor.data_ptr()
            first, end = -(-start // page) * page, (start + tensor.nbytes) // page * page
            if first < end and any(low <= first and end <= high for low, high in files):
                advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_DONTNEED)


def _mapped_files() -> list[tuple[int, int]]:
    """Return the addresses at which this process has mapped files, [start, end)."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.exists() else []
    fields = [line.split(maxsplit=5) for line in lines]
    spans = [field[0].split("-") for field in fields if len(field) == 6 and field[4] != "0"]
    return [(int(low, 16), int(high, 16)) for low, high in spans]


def limit_memory(n_gb: float | None) -> None:
    """Let steps of a training, and copies of weights beside them, take so many GB (--memory-gb);
    0: no copies, and for steps as where nothing is asked for; None: nothing is, whatever an earlier
    training in this process was given.
    """
    global _asked_bytes
    _asked_bytes = None if n_gb is None else int(n_gb * 1e9)


def is_limited() -> bool:
    """Say whether --memory-gb says what steps may take."""
    return bool(_asked_bytes)


def steps_limit_bytes(*, share: float = FREE_SHARE) -> int:
    """Return what a step may take: as limited, else a share of what is free now.

    That is divided among the processes that a launcher started on this machine.
    """
    return _asked_bytes or int(share * available_bytes() / world().local_size)


def copies_limit_bytes() -> int:
    """Return what copies of weights may take together: as limited, or FREE_SHARE of what is free
    when this is first asked, without what is kept for steps.
    """
    left = 0 if _steps_bytes is None else max(0, _limit_bytes() - _steps_bytes)
    return left if _worth_bytes is None or _asked_bytes else min(left, _worth_bytes)


def _limit_bytes() -> int:
    global _free_bytes
    if _asked_bytes is not None:
        return _asked_bytes
    if _free_bytes is None:
        _free_bytes = steps_limit_bytes()
    return _free_bytes


@contextmanager
def kept_for_steps(n_bytes: int | None, *, copies_bytes: int | None = None) -> Iterator[None]:
    """Keep memory for the steps that the body runs: copies take what is left, for None nothing.

    `copies_bytes` is the most that copies are worth to these steps, where --memory-gb does not say
    what memory there is; None: as much as there is.
    """
    global _steps_bytes, _worth_bytes
    before = _steps_bytes, _worth_bytes
    _steps_bytes, _worth_bytes = n_bytes, copies_bytes
    try:
        yield
    finally:
        _steps_bytes, _worth_bytes = before


def available_bytes() -> int:
    """Return what programs can still take: of the machine, or of the container where that is less.

    Memory in which the system keeps files counts as free in both.
    """
    import psutil

    available, left = int(psutil.virtual_memory().available), memory_left_bytes()
    return available if left is None else min(available, left)


def free_swap_bytes() -> int:
    """Return the swap that is free: of the machine, or of the container where that is less."""
    import psutil

    free, left = int(psutil.swap_memory().free), swap_left_bytes()
    return free if left is None else min(free, left)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out; torch has a type for that on an accelerator, and not for all of
    what CUDA says, nor on a CPU: its words are read.
    """
    import torch

    said = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def peak_memory_bytes(device: "torch.device | str" = "cpu") -> int:
    """Return the most memory held so far: by torch on CUDA, resident by this process elsewhere.

    Linux counts VmHWM anew for every program; getrusage there may tell the parent's instead.
    """
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
