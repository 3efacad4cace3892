"""The time of work on a device: a stand-in for CUDA works later than it is told to."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swlora.kernels import device_clock
from swlora.kernels.device_clock import DeviceClock

CUDA = torch.device("cuda")


class Gpu:
    """Works through what it is given when somebody waits; `now_s` is its own time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.queue: list[Any] = []

    def work(self, seconds: float) -> None:
        def run() -> None:
            self.now_s += seconds

        self.queue.append(run)

    def catch_up(self) -> None:
        while self.queue:
            self.queue.pop(0)()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.at_s: float | None = None

        def record(self, stream: Gpu) -> None:
            def note() -> None:
                self.at_s = stream.now_s

            stream.queue.append(note)

        def query(self) -> bool:
            return self.at_s is not None

        def synchronize(self) -> None:
            gpu.catch_up()

        def elapsed_time(self, end: "Event") -> float:
            assert self.at_s is not None and end.at_s is not None
            return 1000 * (end.at_s - self.at_s)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: gpu)
    return gpu


def test_the_work_of_a_gpu_counts_when_it_is_done(gpu: Gpu) -> None:
    """And what it was given before, and between, does not."""
    clock = DeviceClock()
    gpu.work(7)
    for seconds in (0.5, 2.0):
        with clock.running(CUDA):
            gpu.work(seconds)
        gpu.work(30)
    assert gpu.now_s == 0  # nobody waited
    assert clock.seconds == pytest.approx(2.5)
    assert clock.seconds == pytest.approx(2.5)
    with clock.running(CUDA):
        gpu.work(1)
    assert clock.seconds == pytest.approx(3.5)


def test_what_is_done_is_not_kept(gpu: Gpu) -> None:
    clock = DeviceClock()
    for _ in range(100):
        with clock.running(CUDA):
            gpu.work(0.01)
        gpu.catch_up()
    assert len(clock._noted) <= 1
    assert clock.seconds == pytest.approx(1.0)


def test_the_time_of_the_cpu_is_that_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.5, 10.0, 10.25])
    stand_in = SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr(device_clock, "time", stand_in)
    clock = DeviceClock()
    for _ in range(2):
        with clock.running(torch.device("cpu")):
            pass
    assert clock.seconds == 2.75
