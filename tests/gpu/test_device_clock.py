"""A GPU's time for what it is given, beside a stopwatch that waits for it."""

import time

import pytest
import torch

from swlora.kernels.device_clock import DeviceClock

pytestmark = pytest.mark.gpu


def test_it_agrees_with_a_stopwatch_that_waits(device: str) -> None:
    x, clock = torch.ones(2048, 2048, device=device), DeviceClock()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    torch.mm(x, x)
    wait()
    start_s = time.perf_counter()
    with clock.running(x.device):
        for _ in range(20):
            torch.mm(x, x)
    wait()
    waited_s = time.perf_counter() - start_s
    assert 0.5 * waited_s < clock.seconds <= waited_s
