"""A dozen short rows and the configuration of a training on them, for tests of the pipeline."""

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.support.data_files import write_rows

from swlora.config import RunSpec, load_spec
from swlora.progress import Silent
from swlora.runs import Run

ROWS = [
    {"prompt": f"name[{name}], food[{food}]\n", "completion": f"{name} {verb} {food}."}
    for name, food in (("A", "x"), ("Bo", "yy"), ("Cem", "z"), ("Dora", "xx"))
    for verb in ("has", "serves", "is the place for")
]
DEV = [{"prompt": "name[E], food[x]\n", "completion": f"E {verb} x."} for verb in ("has", "sells")]


class Heard(Silent):
    """Keeps what is said, the notes beside the bar, and how much of each task was done before."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.notes: list[str] = []
        self.done_before: dict[str, float] = {}

    def task(
        self, description: str, total: float | None = None, done: float = 0.0
    ) -> AbstractContextManager[Any]:
        self.done_before[description] = done
        return super().task(description, total, done)

    def say(self, message: str) -> None:
        self.lines.append(message)

    def advance(self, amount: float = 1.0, note: str = "") -> None:  # noqa: ARG002
        self.notes.append(note)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter."""
    return load_file(folder / "adapter_model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two adapters are the same bits."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def signal_in_step(n: int) -> Callable[[Run, dict[str, Any]], None]:
    """Return a Run.append_metrics that SIGTERM follows in step n."""
    append = Run.append_metrics

    def appended(run: Run, values: dict[str, Any]) -> None:
        append(run, values)
        if values["step"] == n:
            os.kill(os.getpid(), signal.SIGTERM)

    return appended


def write_data(folder: Path) -> dict[str, str]:
    """Write ROWS and DEV as files; return the settings that name them."""
    for name, rows in (("train", ROWS), ("dev", DEV)):
        write_rows(folder / f"{name}.jsonl", rows)
    return {"data.name": f"{folder}/train.jsonl", "data.eval_file": f"{folder}/dev.jsonl"}


def make_spec(
    model: Path, data: dict[str, str], *, method: str = "lora", **changes: Any
) -> RunSpec:
    """Two epochs of four steps in the layers 1 and 2 of 3."""
    settings: dict[str, Any] = {
        "model.name": str(model),
        "model.device": "cpu",
        "model.dtype": "float32",
        "adapter.method": method,
        "adapter.layers": "last:2",
        "train.epochs": 2,
        "train.batch_size": 3,
        "train.learning_rate": 0.01,
    }
    sizes = {"full": {}, "supertuning": {"adapter.sparsity": 0.9}}
    settings |= sizes.get(method, {"adapter.rank": 3})
    return load_spec(None, data | settings | {k.replace("__", "."): v for k, v in changes.items()})
