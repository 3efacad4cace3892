"""The wish that a training stops after the step under way: a signal, heard by all its processes."""

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
        self.is_asked = False  # of this process
        self._n_asked: Tensor | None = None
        self._asked_s = 0.0

    @property
    def is_set(self) -> bool:
        """Whether the training is to stop after the step under way."""
        if world().is_shared:
            return self._n_asked is not None and float(self._n_asked) > 0
        return self.is_asked

    def agree(self, n_asked: Tensor) -> None:
        """Take how many processes were asked, as their sum has it, a scalar."""
        self._n_asked = n_asked

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
