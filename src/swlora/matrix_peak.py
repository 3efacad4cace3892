"""What a machine's matrix products reach at best, in FLOP/s: measured shortly, kept in the cache.

What is kept is the most that was ever measured for the same processor, versions and dtype: whatever
disturbs a measurement makes it smaller.
"""

import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from swlora.bounded_read import UnreadableError, read_json_object
from swlora.cores import n_usable_cores
from swlora.errors import RunFailedError
from swlora.files import write_json
from swlora.paths import cache_dir

PEAKS = "matrix-peaks.json"
N_CPU, N_CUDA = 2048, 8192  # rows: on CUDA smaller products do not fill the device
ENOUGH_S = 0.4  # of products, of which two at least are timed
MAX_PRODUCTS = 12


def matrix_flops(dtype: Any, device: str = "cpu", enough_s: float = ENOUGH_S) -> float:
    """Return the FLOP/s of the fastest of some products of two square matrices of a torch dtype.

    No random number is drawn: this may be asked for in the middle of a training.
    """
    import torch

    n = N_CUDA if torch.device(device).type == "cuda" else N_CPU
    one = torch.linspace(-1, 1, n * n, device=device).view(n, n).to(dtype)
    other, times_s = one.t().contiguous(), list[float]()
    while len(times_s) < 2 or (sum(times_s) < enough_s and len(times_s) < MAX_PRODUCTS):
        _wait(device)
        start_s = time.perf_counter()
        torch.mm(one, other)
        _wait(device)
        times_s.append(time.perf_counter() - start_s)
    return 2 * n**3 / min(times_s)


def _wait(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def known_peak(dtype: Any, device: str = "cpu") -> float | None:
    """Return the most FLOP/s that were measured here for a dtype; None where nothing was."""
    found = _read(cache_dir() / PEAKS).get(_key(dtype, device))
    return found if isinstance(found, float) and found > 0 else None


def measured_peak(dtype: Any, device: str = "cpu") -> float:
    """Measure now, keep what is more than before, and return the most so far.

    A cache that cannot be written does no harm: the next one measures again.
    """
    path, key = cache_dir() / PEAKS, _key(dtype, device)
    most = max(matrix_flops(dtype, device), known_peak(dtype, device) or 0.0)
    with suppress(RunFailedError):
        write_json(path, {**_read(path), key: most})
    return most


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, max_bytes=1 << 20)
    except UnreadableError:
        return {}


def _key(dtype: Any, device: str) -> str:
    import torch

    name, cores = processor(), n_usable_cores()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {cores} cores, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"


def processor() -> str:
    """Return the name of the machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
