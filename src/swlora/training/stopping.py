"""The wish that a training stops after the step under way, heard by all its processes.

A signal interrupts it; a callback that has seen enough ends it as if it had no more steps.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from swlora.processes import check_peers, has_failed, interruptible, world

SAME_SIGNAL_S = 5.0  # a launcher passes on what a terminal sent to its processes as well


class StopRequest:
    """Whether to stop. With several processes that counts on which they agreed in the last step."""

    def __init__(self) -> None:
        self.is_asked = False  # of this process, by a signal
        self.is_enough = False  # for a callback of this process
        self._agreed: Tensor | None = None
        self._asked_s = 0.0

    @property
    def is_set(self) -> bool:
        """Whether the training is to be interrupted after the step under way."""
        return self._is_agreed(0) if world().is_shared else self.is_asked

    @property
    def ends(self) -> bool:
        """Whether the training is to end after the step under way, with its adapter saved."""
        return self._is_agreed(1) if world().is_shared else self.is_enough

    def end(self) -> None:
        """Let the training end after the step under way."""
        self.is_enough = True

    @property
    def wishes(self) -> list[bool]:
        """Those of this process, to be summed over all."""
        return [self.is_asked, self.is_enough]

    def agree(self, wishes: Tensor) -> None:
        """Take how many processes have each of the `wishes`, as their sum has it, (2,)."""
        self._agreed = wishes

    def _is_agreed(self, number: int) -> bool:
        return self._agreed is not None and float(self._agreed[number]) > 0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Take the first SIGINT or SIGTERM as the wish to stop; the second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous: dict[signal.Signals, Any] = {}

        def put_back() -> None:
            for known, handler in previous.items():
                signal.signal(known, handler)

        def request(number: int, _frame: Any) -> None:
            if has_failed():
                check_peers()  # raises within a step; elsewhere the next one does
            elif not self.is_asked:
                self.is_asked, self._asked_s = True, time.monotonic()
                if not world().is_shared:
                    put_back()
            elif time.monotonic() - self._asked_s > SAME_SIGNAL_S:
                put_back()
                signal.raise_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
        try:
            with interruptible(False):
                yield
        finally:
            put_back()
