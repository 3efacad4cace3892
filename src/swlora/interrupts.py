"""Signals that end a command: SIGTERM does as Ctrl-C, and neither is lost."""

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN_S = 0.05  # by then the finaliser is over


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, so that it is recorded as cancelled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Interrupt again where a finaliser swallowed it.

    Python raises KeyboardInterrupt wherever the program is. In `__del__`, such as that of objects
    which compile regular expressions while a tokenizer is loaded, it can only print it and go on:
    it calls `sys.unraisablehook`, which is another one in here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hook, begun = sys.unraisablehook, list[threading.Timer]()

    def interrupt_again(ignored: Any) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            hook(ignored)
        elif not any(timer.is_alive() for timer in begun):
            begun.append(threading.Timer(AGAIN_S, _interrupt_main_thread))
            begun[-1].daemon = True
            begun[-1].start()

    sys.unraisablehook = interrupt_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in begun:
            timer.cancel()


def _interrupt_main_thread() -> None:
    """Send the signal whose handler raises: a program in the background may ignore SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):
            if hasattr(signal, "pthread_kill"):  # unlike the other one it ends a wait
                signal.pthread_kill(threading.main_thread().ident or 0, number)
            else:
                _thread.interrupt_main(number)
            return
