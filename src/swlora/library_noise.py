"""Bars and notes that libraries write to the terminal, kept off it while they are called."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_n_inside = 0
_before: tuple[Callable[..., None], int] | None = None  # what is put back by the last to leave


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the bars of all libraries, and the notes of transformers, off the terminal.

    What they were set to holds again afterwards. All bars are tqdm's in the end, and some heed
    no setting of their library (those of GGUF conversion). Threads may be inside together.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _n_inside, _before
    from tqdm.std import tqdm
    from transformers.utils import logging

    with _lock:
        if _n_inside == 0:
            drawn = tqdm.__init__

            def hidden(bar: Any, *args: Any, **settings: Any) -> None:
                drawn(bar, *args, **{**settings, "disable": True})

            _before = (drawn, logging.get_verbosity())
            tqdm.__init__ = hidden
            logging.set_verbosity_error()
        _n_inside += 1


def _leave() -> None:
    global _n_inside, _before
    from tqdm.std import tqdm
    from transformers.utils import logging

    with _lock:
        _n_inside -= 1
        if _n_inside == 0 and _before is not None:
            tqdm.__init__, verbosity = _before
            logging.set_verbosity(verbosity)
            _before = None
