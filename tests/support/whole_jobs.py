"""Jobs from the data to the scores on tiny models, stopped and resumed, and what they come to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.support import small_runs
from tests.support.plain_peft import EOS, greedy
from tests.support.small_runs import same_weights

from swlora import pipeline
from swlora.config import RunSpec
from swlora.job import Job
from swlora.progress import Silent
from swlora.result_json import as_json
from swlora.runs import Run, read_run

DEV = [
    {"prompt": "name[E], food[x]\n", "completion": "E has x."},
    {"prompt": "name[Fritz], food[yy]\n", "completion": "Fritz serves yy."},
    {"prompt": "name[E], food[x]\n", "completion": "E serves x."},
]


class StopsIn(Silent):
    """A person who presses Ctrl-C in the n-th advance of a task; a training's start counts."""

    def __init__(self, task: str, n: int) -> None:
        self.name, self.n = task, n
        self.running = ""

    @contextmanager
    def task(
        self,
        description: str,
        total: float | None = None,  # noqa: ARG002
        done: float = 0.0,  # noqa: ARG002
    ) -> Iterator[Any]:
        self.running, before = description, self.running
        if description == "train":
            self.advance(0)
        yield self
        self.running = before

    def advance(self, amount: float = 1.0, note: str = "") -> None:  # noqa: ARG002
        if self.running == self.name:
            self.n -= 1
            if self.n == 0:
                raise KeyboardInterrupt


def make_spec(model: Path, data: tuple[Path, Path], **changes: Any) -> RunSpec:
    """Three epochs of four steps, a prompt's rows each; `changes` as in adapter__rank=2."""
    files = {"data.name": str(data[0]), "data.eval_file": str(data[1])}
    settings: dict[str, Any] = {
        "adapter__layers": "all",
        "train__epochs": 3,
        "train__learning_rate": 0.02,
        "decode__max_new_tokens": 9,
        "identify__windows": 1,
        "identify__window_tokens": 32,
    }
    return small_runs.make_spec(model, files, **settings | changes)


def run_in(folder: Path, spec: RunSpec, command: str = "train-eval", progress: Any = None) -> Any:
    with Run.create(folder, spec, command) as run:
        return work(Job(spec, run, progress or Silent()))


def resume(folder: Path) -> Any:
    run, spec = Run.reopen(folder, read_run(folder)["command"])
    with run:
        return work(Job(spec, run, Silent()))


def work(job: Job) -> Any:
    command = job.run.facts["command"]
    if command == "train-eval":
        trained, evaluated = pipeline.train_evaluate(job)
        return as_json({"train": trained, "eval": evaluated})
    return as_json({"train": pipeline.train, "identify": pipeline.identify}[command](job))


def same_adapters(one: Path, other: Path) -> bool:
    return same_weights(one / "adapter", other / "adapter")


def naive_nll(model, rows: list[dict[str, str]]) -> float:
    total, n_tokens = 0.0, 0
    for row in rows:
        prompt, completion = list(row["prompt"].encode()), [*row["completion"].encode(), EOS]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        log_p = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)
        total -= float(log_p[torch.arange(len(completion)), completion].sum())
        n_tokens += len(completion)
    return total / n_tokens


def naive_text(model, tokenizer, prompt: str, n: int = 9) -> str:
    ids = greedy(model, list(prompt.encode()), n)
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
