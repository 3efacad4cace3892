"""Runs a Python command line that ends with the process that started it.

    python -m swlora.study.guarded PARENT -m MODULE ...      PARENT is that process's number

A killed worker would otherwise leave its run at work in a folder in which it is begun again.
"""

import os
import runpy
import signal
import sys
import threading
import time

LOOK_EVERY_S = 0.5
STOPS_S = 30.0  # how long it may take to stop after the present step


def guarded(command: list[str]) -> list[str]:
    """Return a Python command line so that its process ends with this one."""
    python, *rest = command
    return [python, "-m", "swlora.study.guarded", str(os.getpid()), *rest]


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOPS_S)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the rest of the command line as Python would."""
    _, parent, *rest = sys.argv
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    is_module = rest[0] == "-m"
    sys.argv = rest[1:] if is_module else rest
    if is_module:
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main()
