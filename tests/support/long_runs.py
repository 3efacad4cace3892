"""A training of many steps in a process of its own, and what it holds on the way."""

import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tests.support.fault_trials import train_in
from tests.support.small_runs import ROWS

from swlora.config import load_spec
from swlora.progress import Silent

DEADLINE_S = 1200.0
MAX_GROWTH = 1.03  # of the memory after the first tenth
BATCH_SIZE = 3  # as of write_inputs


@dataclass(frozen=True)
class Held:
    """What a process holds at a moment."""

    step: int
    memory_bytes: int
    files: int
    threads: int


class _Watched(Silent):
    """Notes what the process holds, every so many steps."""

    def __init__(self, every: int) -> None:
        self._every, self._step, self._is_training = every, 0, False
        self._process = psutil.Process()
        self.held: list[Held] = []

    @contextmanager
    def task(
        self,
        description: str,
        total: float | None = None,  # noqa: ARG002
        done: float = 0.0,
    ) -> Iterator["_Watched"]:
        self._is_training = description == "train"
        self._step = int(done) if self._is_training else self._step
        yield self
        self._is_training = False

    def advance(self, amount: float = 1.0, note: str = "") -> None:  # noqa: ARG002
        self._step += int(amount) * self._is_training
        if amount and self._is_training and self._step % self._every == 0:
            memory = self._process.memory_info().rss
            files, threads = self._process.num_fds(), self._process.num_threads()
            self.held.append(Held(self._step, memory, files, threads))


def held_in_training(settings: Mapping[str, Any], folder: Path, n_steps: int) -> list[Held]:
    """Train so many steps; return what was held after each tenth of them."""
    steps_an_epoch = -(-len(ROWS) // BATCH_SIZE)
    changes = {"train.epochs": -(-n_steps // steps_an_epoch), "train.max_steps": n_steps}
    changes |= {"train.save_every": f"{max(1, n_steps // 20)}steps"}
    context = multiprocessing.get_context("spawn")
    told = folder / "held.json"
    arguments = ({**settings, **changes}, str(folder), n_steps // 10, str(told))
    process = context.Process(target=_train, args=arguments)
    process.start()
    process.join(DEADLINE_S)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"the training ended with {process.exitcode}")
    return [Held(**one) for one in json.loads(told.read_text(encoding="utf-8"))]


def _train(settings: dict[str, Any], folder: str, every: int, told: str) -> None:
    os.environ["SWLORA_CACHE"] = f"{folder}/cache"
    torch.set_num_threads(1)
    watched = _Watched(every)
    train_in(Path(folder) / "run", load_spec(None, settings), watched)
    held = [asdict(one) for one in watched.held]
    Path(told).write_text(json.dumps(held), encoding="utf-8")
