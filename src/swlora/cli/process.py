"""What a command does to its process: libraries that are kept quiet, and which process prints.

Allocator, kernels and threads are set where a model is loaded (`swlora.models.load`), since they
matter to every program that loads one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from swlora.processes import world


def no_library_notes() -> None:
    """Keep libraries' own bars and notes off the terminal for as long as the process lives."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def shown_by_main() -> Iterator[None]:
    """Let the first process alone print results."""
    if world().is_main:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield
