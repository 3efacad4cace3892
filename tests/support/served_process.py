"""`swlora serve` as a process."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, module: str = "swlora") -> list[str]:
    verb = ["serve"] if module == "swlora" else []
    return [sys.executable, "-m", module, *verb, *arguments]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "SWLORA_API_KEY"}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


@contextmanager
def started(
    log: Path, *arguments: str, module: str = "swlora"
) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start a server on a free port, with stderr to a file; yield (process, URL)."""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command(*arguments, "--port", "0", module=module),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(
        target=lambda: [lines.put(line) for line in chain(process.stdout, [""])], daemon=True
    ).start()
    try:
        said = lines.get(timeout=240)
        assert said.startswith("serving http://127.0.0.1:"), log.read_text()
        yield process, said.split()[1]
    finally:
        process.kill()
        process.wait()


@contextmanager
def served(log: Path, flags: dict[str, Any], *switches: str) -> Iterator[str]:
    """Run `swlora serve`; yield its address."""
    with started(log, *map(str, sum(flags.items(), ())), *switches) as (_, address):
        yield address
        assert "Traceback" not in log.read_text()
