"""Several real processes that train together, each with the environment that a launcher gives it.

They are forked like those of `kills`. The first one keeps the store, as no launcher does it.
"""

import random
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.kills import IN_STEP, SIGNAL, Process


class Ranks:
    """N processes of one command; `arguments` of all, or those of each by rank."""

    def __init__(
        self,
        arguments: Sequence[str] | Mapping[int, Sequence[str]],
        folder: Path,
        n: int = 2,
        environments: Mapping[int, Mapping[str, str]] | None = None,
    ) -> None:
        port = str(random.SystemRandom().randrange(20_000, 32_000))
        self.processes = []
        for rank in range(n):
            environment = {
                **{"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)},
                **{"LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                **(environments or {}).get(rank, {}),
            }
            own = arguments[rank] if isinstance(arguments, Mapping) else arguments
            log = folder / f"log-{rank}"
            self.processes.append(Process(own, folder / "cache", log, environment))

    def end(self, deadline_s: float = 100.0) -> list[tuple[int, str]]:
        """Wait for all; return their exit codes and what each wrote."""
        try:
            return [process.ends(deadline_s) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill_after(0)


def signal_itself(number: signal.Signals, step: int) -> dict[str, str]:
    """Return the environment of a process that sends itself a signal in a step of a training."""
    return {SIGNAL: str(int(number)), IN_STEP: str(step)}
