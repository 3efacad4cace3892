"""A training of eleven numbers in two parameters, to look at the loop alone."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from swlora.adapters.adapted import Adapted
from swlora.config import AdapterSpec, RunSpec, TrainSpec
from swlora.loss_sum import LossSum
from swlora.metrics_file import read_metrics
from swlora.progress import Silent
from swlora.runs import Run
from swlora.training.callbacks import Callback
from swlora.training.loop import train
from swlora.training.schedule import Schedule, Step

N_ROWS = 11
TIMES = ("elapsed_s", "examples_per_s", "nodes_per_s", "tokens_per_s", "busy_share")
Hook = Callable[[int], None]


def spec(**changes: Any) -> TrainSpec:
    return TrainSpec(**{"epochs": 2, "learning_rate": 0.1, "warmup_fraction": 0.2} | changes)


def plan(epoch: int) -> list[list[np.ndarray]]:
    """Three steps of 4, 4 and 3 rows, in one or two parts, in another order every epoch."""
    order = np.random.default_rng(epoch).permutation(N_ROWS)
    return [[order[:4]], [order[4:6], order[6:8]], [order[8:]]]


def schedule(train_spec: TrainSpec) -> Schedule:
    return Schedule(train_spec, plan, n_steps_per_epoch=3)


def adapted(parameters: dict[str, nn.Parameter]) -> Adapted:
    return Adapted(nn.ParameterDict(parameters), AdapterSpec())


def fresh_parameters(device: str = "cpu") -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a": nn.Parameter(torch.randn(5, 2, generator=generator).to(device)),
        "b": nn.Parameter(torch.randn(2, generator=generator).to(device)),
    }


class ToyStep:
    """A regression with dropout from the global random generator; row i has i + 1 tokens."""

    def __init__(self, parameters: dict[str, nn.Parameter], before: Hook | None = None) -> None:
        self.parameters = parameters
        self.n_calls = 0
        self.before = before
        self.rows_seen: list[list[int]] = []
        self.device = next(iter(parameters.values())).device
        self.x = torch.randn(N_ROWS, 5, generator=torch.Generator().manual_seed(4)).to(self.device)

    def __call__(self, rows: Step) -> LossSum:
        self.n_calls += 1
        if self.before is not None:
            self.before(self.n_calls)
        ids = np.concatenate(rows)
        self.rows_seen.append(ids.tolist())
        kept = torch.nn.functional.dropout(self.x[ids], 0.4)
        n_tokens = torch.from_numpy(ids + 1).to(self.device)
        errors = (kept @ self.parameters["a"] + self.parameters["b"] - 1).square().sum(1)
        loss = (errors * n_tokens).sum()
        loss.backward()
        return LossSum(float(loss.detach()), int(n_tokens.sum()))


def start(folder: Path) -> Run:
    return Run.create(folder, RunSpec(), "train")


def run_loop(
    run: Run,
    train_spec: TrainSpec,
    before: Hook | None = None,
    device: str = "cpu",
    callbacks: Sequence[Callback] = (),
) -> tuple[dict[str, nn.Parameter], ToyStep]:
    parameters = fresh_parameters(device)
    step = ToyStep(parameters, before)
    with run:
        train(
            *(step, schedule(train_spec), adapted(parameters), run, Silent()), callbacks=callbacks
        )
    return parameters, step


def metrics_of(run: Run) -> list[dict[str, Any]]:
    rows = read_metrics(run.folder)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def interrupted_at(step: int, how: str) -> Hook:
    """Stop in step `step`: by a signal, or as a crash would, before the step is done."""

    def before(n_calls: int) -> None:
        if n_calls != step:
            return
        if how == "crash":
            raise MemoryError
        os.kill(os.getpid(), getattr(signal, how))

    return before


def damage(checkpoint: Path, number: int) -> None:
    """Flip a bit in the data of a snapshot."""
    path = checkpoint / f"state-{number}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
