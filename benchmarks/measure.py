"""Stopwatch, memory and floating-point yardsticks, the same for every arm.

    share of peak   = necessary FLOPs / seconds / FLOP/s of the best 2048^3 product

Necessary FLOPs are those of `swlora.training.necessary_work`.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

STATUS = Path("/proc/self/status")


class Stopwatch:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start_s


class Memory:
    """Peak resident memory of this process, before and during the training, in bytes."""

    def __init__(self) -> None:
        self.load_peak_bytes = status_bytes("VmHWM")
        self.rss_before_bytes = status_bytes("VmRSS")
        # Resets the peak to what is resident now (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")

    def report(self) -> dict[str, int]:
        """Return the peaks; call it when the training is over."""
        train_peak_bytes = status_bytes("VmHWM")
        return {
            "rss_before_bytes": self.rss_before_bytes,
            "load_peak_bytes": self.load_peak_bytes,
            "train_peak_bytes": train_peak_bytes,
            "peak_bytes": max(self.load_peak_bytes, train_peak_bytes),
        }


class PrivatePeak:
    """The most memory of this process's own (RssAnon), looked at fifty times a second.

    The pages of a mapped file are left out: the system takes them back when it needs them.
    """

    def __init__(self) -> None:
        self.n_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Return the peak so far, in bytes, and look no more."""
        self._done.set()
        self._thread.join()
        return self.n_bytes

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.n_bytes = max(self.n_bytes, status_bytes("RssAnon"))


def status_bytes(field: str) -> int:
    """Return a size from the process's own status, such as VmHWM, VmRSS or RssAnon (proc(5))."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def gemm_flops(dtype: torch.dtype, n: int = 2048, repeats: int = 12, device: str = "cpu") -> float:
    """Return the FLOP/s of the fastest of `repeats` products of two n x n matrices.

    On CUDA they are products of 8192 x 8192: smaller ones do not fill it.
    """
    n = 8192 if device == "cuda" else n
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(repeats):
        _wait(device)
        start_s = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * n**3 / best_s


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rates(ticks: list[float], rows: list[int], tokens: list[int], n_warmup: int) -> dict[str, Any]:
    """Summarise steps that ended at ticks[1:], the first having begun at ticks[0].

    `rows` and `tokens` (as run, padding included) are by step. `examples_per_s` is rows over
    seconds of all steps but the first `n_warmup`; `warmup_s` is what those took longer than their
    tokens would have taken later.
    """
    seconds = np.diff(np.asarray(ticks))
    counts = np.asarray(rows, dtype=float)
    if len(seconds) != len(counts):
        raise RuntimeError(f"{len(seconds)} steps were timed, {len(counts)} planned")
    if len(counts) <= n_warmup:
        raise RuntimeError(f"{len(counts)} steps leave none to time; give more rows")
    steady_s, steady_rows = float(seconds[n_warmup:].sum()), float(counts[n_warmup:].sum())
    steady_tokens = sum(tokens[n_warmup:])
    warmup_s = seconds[:n_warmup].sum() - sum(tokens[:n_warmup]) * steady_s / steady_tokens
    return {
        "steps": len(counts) - n_warmup,
        "rows": int(steady_rows),
        "steady_s": steady_s,
        "total_s": float(seconds.sum()),
        "examples_per_s": steady_rows / steady_s,
        "examples_per_s_median_step": float(np.median((counts / seconds)[n_warmup:])),
        "tokens_run": steady_tokens,
        "warmup_s": max(0.0, float(warmup_s)),
    }


def machine_state() -> dict[str, Any]:
    """Return the load average, which shows whether the machine was idle."""
    return {"load_average": list(os.getloadavg()), "at": time.strftime("%Y-%m-%dT%H:%M:%S")}
