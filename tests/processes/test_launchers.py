"""The launchers that people use start `swlora train`: torchrun and accelerate, on the CPU."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.fault_trials import write_inputs
from tests.support.small_runs import same_weights

from swlora.config import dump_yaml, load_spec
from swlora.metrics_file import read_metrics
from swlora.runs import read_run
from swlora.training.checkpoint import steps_done

pytestmark = pytest.mark.slow
ENDED_S = 30.0
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


class Launched:
    """A launcher of `swlora train`, and what it and its processes write."""

    def __init__(
        self,
        launcher: tuple[str, ...],
        folder: Path,
        arguments: tuple[str, ...] = (),
        **changes: Any,
    ) -> None:
        settings = write_inputs(folder)
        settings |= {"train.epochs": 5000, "train.max_steps": None, "train.batch_size": 6}
        settings |= {name.replace("__", "."): value for name, value in changes.items()}
        (folder / "config.yaml").write_text(dump_yaml(load_spec(None, settings)), encoding="utf-8")
        self.run, self._launcher, self._log = folder / "run", launcher, folder / "log"
        self._environment = os.environ | {"SWLORA_CACHE": str(folder / "cache")}
        config = str(folder / "config.yaml")
        self.start("--config", config, "--output", str(self.run), *arguments)

    def start(self, *arguments: str) -> None:
        program = ["-m", "swlora", "train", *arguments]
        command = [sys.executable, *self._launcher, *program]
        with self._log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

    def await_steps(self, n: int, within_s: float = 120.0) -> None:
        """Wait until n steps are done."""
        until_s = time.monotonic() + within_s
        metrics = self.run / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= n):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until_s, self.said
            time.sleep(0.05)

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(c for c in children if c.environ().get("RANK") == str(number))

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def lines(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("swlora:")]

    def end(self, within_s: float = 120.0) -> int:
        try:
            return self.process.wait(within_s)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def test_torchrun_trains_to_the_end(tmp_path):
    launched = Launched(TORCHRUN, tmp_path, train__epochs=3)
    assert launched.end() == 0, launched.said
    facts = read_run(launched.run)
    assert (facts["status"], facts["processes"]) == ("done", 2)
    assert len(read_metrics(launched.run)) == 6
    assert launched.said.count("run folder:") == 1  # the first process alone prints
    assert launched.said.count("data: ") == 1


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_run_with_its_name_and_it_resumes(killed, tmp_path):
    launched = Launched(TORCHRUN, tmp_path, train__save_every="1step")
    launched.await_steps(20)
    start_s = time.monotonic()
    launched.rank(killed).send_signal(signal.SIGKILL)
    assert launched.end() != 0
    assert time.monotonic() - start_s < ENDED_S
    assert len(launched.lines) == 1, launched.said
    assert re.search(rf"rank {killed} on \S+ \(process \d+\) is gone", launched.lines[0])
    n_done = steps_done(launched.run / "checkpoint")
    assert n_done >= 19
    launched.start(*("--resume", "--output", str(launched.run), "--epochs", str(n_done // 2 + 2)))
    assert launched.end() == 0, launched.said
    assert read_run(launched.run)["status"] == "done"


def test_a_launcher_that_starts_its_processes_again(tmp_path):
    """What failed before is no failure of those that it starts then."""
    launched = Launched((*TORCHRUN, "--max-restarts", "1"), tmp_path, train__save_every="1step")
    launched.await_steps(5)
    launched.rank(1).send_signal(signal.SIGKILL)
    assert launched.end() != 0
    first, second = launched.lines
    assert re.search(r"rank 1 on .* is gone", first)
    assert "--resume" in second and "is gone" not in second  # there is a run in the folder


def test_a_launcher_that_stands_still_is_missed(tmp_path):
    """As one whose machine is off: its store answers no more, and no connection ends."""
    launched = Launched(TORCHRUN, tmp_path, train__save_every="1step")
    launched.await_steps(5)
    processes = [launched.rank(number) for number in range(2)]
    launched.process.send_signal(signal.SIGSTOP)
    try:
        _, alive = psutil.wait_procs(processes, timeout=ENDED_S)
        n_dead = sum(p.status() == psutil.STATUS_ZOMBIE for p in alive) + 2 - len(alive)
        assert n_dead == 2, launched.said
    finally:
        launched.process.send_signal(signal.SIGCONT)
    launched.end()
    assert any("the launcher" in line and "out of reach" in line for line in launched.lines)


@pytest.mark.parametrize("from_a_terminal", [False, True])
def test_a_stopped_launcher_leaves_a_checkpoint(from_a_terminal, tmp_path):
    """A terminal sends its signal to all processes, and the launcher sends it on to them."""
    launched = Launched(TORCHRUN, tmp_path, train__save_every="1h")
    launched.await_steps(5)
    if from_a_terminal:
        os.killpg(launched.process.pid, signal.SIGINT)
    else:
        launched.process.send_signal(signal.SIGTERM)
    launched.end(ENDED_S)
    assert read_run(launched.run)["status"] == "cancelled"
    n_done = steps_done(launched.run / "checkpoint")
    assert n_done == len(read_metrics(launched.run)) >= 5
    assert len(launched.lines) == 1, launched.said
    assert f"stopped after step {n_done} of" in launched.lines[0]


def test_the_same_in_python(tmp_path):
    """A program that calls `swlora.train` twice, and then a function for one process."""
    settings = write_inputs(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(load_spec(None, settings)), encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, swlora\n"
        "def say(*words):\n"  # in one piece: torchrun's processes do not buffer, and share a pipe
        "    os.write(1, (' '.join(map(str, words)) + '\\n').encode())\n"
        f"for name in ('one', 'two'):\n"
        f"    folder = {str(tmp_path)!r} + '/' + name\n"
        f"    trained = swlora.train(config={str(config)!r}, output=folder)\n"
        "say('trained', trained.course.steps, trained.adapter is None)\n"
        f"evaluated = swlora.evaluate(folder, config={str(config)!r})\n"
        "say('evaluated', evaluated.nll, evaluated.scores is None)\n"
        "try:\n"
        f"    swlora.generate('A', config={str(config)!r})\n"
        "except Exception as error:\n"
        "    say('no:', error)\n",
        encoding="utf-8",
    )
    cache = os.environ | {"SWLORA_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, *TORCHRUN, str(program)]
    done = subprocess.run(command, env=cache, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path / "one/adapter", tmp_path / "two/adapter")
    lines = sorted(done.stdout.splitlines())
    assert lines[4:] == ["trained 4 False", "trained 4 True"]
    assert all("swlora generate works in one process" in line for line in lines[2:4])
    (first, has_scores), (second, has_none) = (line.split()[1:] for line in lines[:2])
    assert first == second
    assert (has_scores, has_none) == ("False", "True")


def test_accelerate_starts_one_process_on_cpus_which_is_noticed(tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    launched = Launched(launcher, tmp_path, arguments=("--processes", "2"))
    assert launched.end() != 0
    assert launched.lines == [
        "swlora: --processes 2, and there is 1: start with torchrun --nproc-per-node 2 "
        "-m swlora ... (accelerate launch --cpu starts a single one)"
    ]
    assert not launched.run.exists()


PROGRAM = """
import os, sys, swlora

told = []

def enough(report):
    told.append(report.step)
    if report.step == 3:
        report.stop()

trained = swlora.train(config=sys.argv[1], output=sys.argv[2], callbacks=enough)
print(f"rank {os.environ['RANK']}: {trained.course.steps} steps, told of {told}", flush=True)
"""


def test_a_callback_of_the_first_process_ends_the_training_of_all(tmp_path):
    """After the next step, with whose sum they agree on it."""
    (tmp_path / "program.py").write_text(PROGRAM)
    settings = write_inputs(tmp_path) | {"train.epochs": 50, "train.max_steps": None}
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(load_spec(None, settings)), encoding="utf-8")
    command = [sys.executable, *TORCHRUN, "program.py", str(config), str(tmp_path / "run")]
    environment = os.environ | {"SWLORA_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert said == [
        "rank 0: 4 steps, told of [1, 2, 3, 4]",
        "rank 1: 4 steps, told of []",
    ]
    facts = read_run(tmp_path / "run")
    assert (facts["status"], facts["stopped_after_step"]) == ("done", 4)
