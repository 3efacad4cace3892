"""The seconds that a device takes for stretches of work that are given to it, and not waited for.

A GPU is handed work far ahead: a stopwatch on the CPU would show how long the handing over takes,
and waiting for the device would slow down what is measured. So the device itself notes when it
comes by (CUDA events), and is asked later.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class DeviceClock:
    """Sums the seconds of all bodies of `running` so far."""

    def __init__(self) -> None:
        self._past_s = 0.0
        self._noted: deque[tuple[Any, Any]] = deque()  # begin and end that were not read yet

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Add the seconds that `device` takes for what the body gives it."""
        if device.type != "cuda":
            start_s = time.perf_counter()
            yield
            self._past_s += time.perf_counter() - start_s
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        yield
        end.record(stream)
        self._noted.append((begin, end))
        while self._noted and self._noted[0][1].query():  # few are kept where nobody asks
            self._read_first()

    @property
    def seconds(self) -> float:
        """The sum; waits for the end of the last body's work."""
        while self._noted:
            self._read_first()
        return self._past_s

    def _read_first(self) -> None:
        begin, end = self._noted.popleft()
        end.synchronize()
        self._past_s += begin.elapsed_time(end) / 1000  # of milliseconds
