"""How many CPU threads compute: fewer while other programs need the cores, all of them again after.

The threads of a product take equal parts and wait for one another, so one that loses its core to
another program holds up the rest: one busy program on two cores took training to a fifth of its
rate, where a single thread, left alone on the other core, keeps more than half. So

    others = (CPU seconds of the whole machine - those of this process) / seconds
    threads <= cores - others, rounded

looked at twice a second, while the work goes on. In bfloat16 a training is the same to the last bit
with any number of threads; in float32 torch's BLAS splits long sums among them, so that a run that
has to repeat there to the last bit names its number (`fix_threads`).
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import torch

from swlora.cgroup import quota_cores
from swlora.cores import allowed_cores, n_usable_cores
from swlora.processes import world

WINDOW_S = 0.5
FRESH_S = 5.0  # so long a choice holds for work that begins anew
# A core counts as free where others use less of it. On two cores both choices train equally fast
# where a program would use half of one; beside two threads it gets 0.3 of it then, and 0.5 beside
# one. (A one-off trial: three steps each, beside programs busy 0.25, 0.5 and 0.75 of the time.)
TAKEN_SHARE = 0.45


@dataclass(frozen=True)
class CpuClock:
    """What has been used so far, in seconds: wall clock, this process, all of its cores."""

    wall_s: float
    own_s: float
    all_s: float

    def others_since(self, before: "CpuClock") -> float:
        """Return how many cores other programs used since `before`: 0 where the clocks disagree."""
        others_s = (self.all_s - before.all_s) - (self.own_s - before.own_s)
        return max(0.0, others_s / (self.wall_s - before.wall_s))


class ThreadChoice:
    """Chooses between 1 and `most` threads on a machine with `n_cores` cores.

    `read` tells the time; a look is made where the last one is WINDOW_S old.
    """

    def __init__(self, most: int, n_cores: int, read: Callable[[], CpuClock]) -> None:
        self.n = most
        self._most, self._n_cores, self._read = most, n_cores, read
        self._last = read()
        self._spare_before = 0.0  # cores that the last look found free for us

    def look(self) -> int:
        """Return the number of threads to use from here on."""
        now = self._read()
        spare = self._n_cores - now.others_since(self._last)
        self._last = now
        # More only where two looks agree: a program may pause for a moment.
        lasting = min(spare, self._spare_before)
        self.n = min(max(self.n, self._fitting(lasting)), self._fitting(spare))
        self._spare_before = spare
        return self.n

    def _fitting(self, spare: float) -> int:
        return max(1, min(self._most, int(spare + TAKEN_SHARE)))

    @property
    def age_s(self) -> float:
        """Seconds since the last look."""
        return time.monotonic() - self._last.wall_s


class OthersShare:
    """Measures the part of the cores that other programs use, over the last WINDOW_S or longer."""

    def __init__(self, read: Callable[[], CpuClock], n_cores: int) -> None:
        self._read, self._n_cores = read, n_cores
        self._last = read()
        self.share: float | None = None

    def look(self) -> float | None:
        """Return the newest measurement, from 0 to 1; None before there is one."""
        if time.monotonic() - self._last.wall_s >= WINDOW_S:
            now = self._read()
            self.share = min(1.0, now.others_since(self._last) / self._n_cores)
            self._last = now
        return self.share


def others_share() -> OthersShare | None:
    """Begin to measure what other programs use of the cores that this process may run on.

    None where the machine does not tell how busy it is.
    """
    with suppress(OSError, NotImplementedError, RuntimeError):
        return OthersShare(read_clock, len(allowed_cores()))
    return None


def read_clock() -> CpuClock:
    """Read the clocks of this process and of the cores that it may run on.

    Time in which a core waits for the disk, or that a hypervisor took, counts as free.
    """
    cores = psutil.cpu_times(percpu=True)
    allowed = allowed_cores()
    ours = [times for number, times in enumerate(cores) if number in allowed]
    kinds = ("user", "nice", "system", "irq", "softirq")
    all_s = sum(getattr(times, kind, 0.0) for times in ours for kind in kinds)
    return CpuClock(time.monotonic(), time.process_time(), all_s)


@dataclass
class _Process:
    """What holds for the whole process; a choice outlives the work that asked for it."""

    is_fixed: bool = False
    n_before: int | None = None  # threads, before a setting named some
    choice: ThreadChoice | None = None
    n_adapting: int = 0


_process = _Process()


def share_cores() -> None:
    """Compute with this process's share of the cores, where a launcher started several here, and
    with no more threads than its container has CPU time for, of which torch knows nothing.

    torchrun gives each a single thread where OMP_NUM_THREADS was not set; two or more threads there
    are the user's, and stay.
    """
    if _process.is_fixed:
        return
    n_here, asked = world().local_size, os.environ.get("OMP_NUM_THREADS")
    if n_here > 1 and asked in (None, "1"):
        torch.set_num_threads(max(1, n_usable_cores() // n_here))
    elif n_here == 1 and asked is None and (quota := quota_cores()) is not None:
        torch.set_num_threads(min(torch.get_num_threads(), quota))


def fix_threads(n: int) -> None:
    """Compute with `n` threads from here on, whatever else runs."""
    torch.set_num_threads(n)
    _process.is_fixed = True


def settle_threads(n: int | None) -> None:
    """Compute with the `n` threads of a setting from here on; None: as before one named some."""
    if n is not None:
        if _process.n_before is None:
            _process.n_before = torch.get_num_threads()
        fix_threads(n)
        return
    if _process.n_before is not None:
        torch.set_num_threads(_process.n_before)
        _process.n_before, _process.is_fixed = None, False
    share_cores()


@contextmanager
def adapted_threads() -> Iterator[None]:
    """Let `adapt_threads` have an effect while the body runs; the number is put back after it.

    Where the machine does not tell how busy it is, or `fix_threads` was called, nothing changes.
    """
    most = torch.get_num_threads()
    if _process.choice is None and most > 1 and not _process.is_fixed:
        with suppress(OSError, NotImplementedError, RuntimeError):
            # Not those of a quota: what others use of all cores takes nothing from it.
            _process.choice = ThreadChoice(most, len(allowed_cores()), read_clock)
    choice = _process.choice
    if choice is not None and not _process.is_fixed and choice.age_s < FRESH_S:
        torch.set_num_threads(choice.n)
    _process.n_adapting += 1
    try:
        yield
    finally:
        _process.n_adapting -= 1
        torch.set_num_threads(most)


def adapt_threads() -> None:
    """Use as many threads as the machine has to spare; called often, between pieces of work."""
    choice = _process.choice
    if choice is None or not _process.n_adapting or _process.is_fixed or choice.age_s < WINDOW_S:
        return
    n = choice.look()
    if n != torch.get_num_threads():
        torch.set_num_threads(n)
