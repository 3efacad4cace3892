"""Real processes of swlora, killed at random moments and resumed.

They are forked from a process that has imported everything, since importing takes longer than these
trainings; each runs the command line from its beginning.
"""

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.support.fault_trials import Outcome

from swlora.cli import main
from swlora.config import dump_yaml, load_spec
from swlora.memory import peak_memory_bytes
from swlora.run_record import MemoryRecord
from swlora.runs import Run

IMPORTED = (  # before the forks
    *("peft", "accelerate", "transformers.models.llama.modeling_llama", "sacrebleu", "psutil"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "tests.support.fault_trials"),
    *("swlora.training.loop", "swlora.training.step", "swlora.evaluation.scoring"),
)
NO_RUN = ("holds no run", "before it began")  # then it is started, not resumed
DEADLINE_S = 120.0
FOLDER = "TEST_FOLDER"  # in which a process works
SIGNAL, IN_STEP = "TEST_SIGNAL", "TEST_SIGNAL_IN_STEP"  # what a process sends itself, and when
# What trainings are tried: the command, and its settings beside those of `write_inputs`
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("train", {"adapter.dropout": 0.2}),
    "dora": ("train", {"adapter.method": "dora"}),
    "adalora": ("train", {"adapter.method": "adalora", "train.epochs": 2, "train.max_steps": 8}),
    "pissa": ("train", {"adapter.method": "pissa"}),
    "full": ("train", {"adapter.method": "full", "adapter.rank": None}),
    "best adapter": ("train", {"train.eval_every_steps": 2}),
    "eval": ("train-eval", {"decode.max_new_tokens": 8}),
}


@dataclass(frozen=True)
class Case:
    """A training to be killed: its command, configuration file, outcome and duration."""

    command: str
    config: Path
    expected: Outcome
    duration_s: float


class Process:
    """One call of swlora in a process of its own."""

    def __init__(
        self,
        arguments: Sequence[str],
        cache: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *IMPORTED])
        self._log = log
        call = (list(arguments), str(cache), str(log), dict(environment or {}))
        self._process = context.Process(target=_call, args=call)
        self._process.start()

    @property
    def peak_bytes(self) -> int:
        """The most memory that it held, once it has ended by itself; 0 where it was killed."""
        return int(said.read_text()) if (said := _peak(self._log)).exists() else 0

    def kill_after(self, delay_s: float) -> bool:
        """Kill it then; say whether it was still at work."""
        self._process.join(delay_s)
        if self._process.exitcode is not None:
            return False
        self._process.kill()
        self._process.join()
        return True

    def ends(self, deadline_s: float = DEADLINE_S) -> tuple[int, str]:
        """Wait for its end; return its exit code and what it wrote."""
        self._process.join(deadline_s)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"not done after {deadline_s:.0f} s")
        return self._process.exitcode, self._log.read_text(encoding="utf-8")


def _call(arguments: list[str], cache: str, log: str, environment: dict[str, str]) -> None:
    no_java = {"PATH": ""}  # METEOR waits ten seconds for it
    os.environ |= {"SWLORA_CACHE": cache, "HF_HUB_OFFLINE": "1", **no_java, **environment}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    torch.set_num_threads(1)
    if FOLDER in environment:
        os.chdir(environment[FOLDER])
    if SIGNAL in environment:
        _signal_itself(int(environment[SIGNAL]), int(environment[IN_STEP]))
    try:
        main(arguments)
    finally:
        _peak(Path(log)).write_text(str(peak_memory_bytes("cpu")))


def _signal_itself(number: int, step: int) -> None:
    """Have this process send itself a signal after a step of its training."""
    for kind in (Run, MemoryRecord):
        append: Callable[..., None] = kind.append_metrics

        def appended(
            record: Any, values: Mapping[str, Any], append: Callable[..., None] = append
        ) -> None:
            append(record, values)
            if values["step"] == step:
                os.kill(os.getpid(), number)

        kind.append_metrics = appended  # type: ignore[method-assign]


def _peak(log: Path) -> Path:
    return log.with_suffix(".peak")


def prepare_case(name: str, settings: Mapping[str, Any], folder: Path) -> Case:
    """Run a training of CASES to its end in `folder`, and note what it came to."""
    command, changes = CASES[name]
    folder.mkdir(parents=True)
    config = folder / "config.yaml"
    config.write_text(dump_yaml(load_spec(None, {**settings, **changes})), encoding="utf-8")
    Process(["--help"], folder / "cache", folder / "log").ends()  # the first one imports
    start_s = time.monotonic()
    begun = Process(_start(command, config, folder / "run"), folder / "cache", folder / "log")
    code, said = begun.ends()
    if code:
        raise RuntimeError(f"{name}: {said}")
    duration_s = time.monotonic() - start_s
    return Case(command, config, Outcome.of(folder / "run"), duration_s)


def kill_and_resume(
    case: Case, folder: Path, cache: Path, drawn: random.Random, n_kills: int = 1
) -> tuple[int, str | None]:
    """Kill a training so often, each time resuming it; return (kills, what differs in the end)."""
    run, log, n_killed, is_begun = folder / "run", folder / "log", 0, False
    while True:
        again = [case.command, "--resume", "--output", str(run)]
        process = Process(again if is_begun else _start(case.command, case.config, run), cache, log)
        if n_killed < n_kills and process.kill_after(drawn.uniform(0, case.duration_s)):
            n_killed, is_begun = n_killed + 1, True
            continue
        code, said = process.ends()
        if is_begun and any(reason in said for reason in NO_RUN):
            is_begun = False
        elif code == 0 or "there is nothing to resume" in said:
            return n_killed, case.expected.difference(run)
        else:
            return n_killed, f"exit code {code}: {said.strip().splitlines()[-1:]}"


def _start(command: str, config: Path, run: Path) -> list[str]:
    return [command, "--config", str(config), "--output", str(run)]
