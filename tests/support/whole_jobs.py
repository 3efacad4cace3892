"""Jobs from the data to the scores on tiny models, stopped and resumed, and what they come to."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from swlora import pipeline
from swlora.config import RunSpec, load_spec
from swlora.job import Job
from swlora.progress import Silent
from swlora.result_json import as_json
from swlora.runs import Run, read_run

EOS = 257
TRAIN = [
    {"prompt": f"name[{name}], food[{food}]\n", "completion": f"{name} {verb} {food}."}
    for name, food in (("A", "x"), ("Bo", "yy"), ("Cem", "z"), ("Dora", "xx"))
    for verb in ("has", "serves", "is the place for")
]
DEV = [
    {"prompt": "name[E], food[x]\n", "completion": "E has x."},
    {"prompt": "name[Fritz], food[yy]\n", "completion": "Fritz serves yy."},
    {"prompt": "name[E], food[x]\n", "completion": "E serves x."},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_spec(model: Path, data: tuple[Path, Path], **changes: Any) -> RunSpec:
    """Three epochs of four steps, a prompt's rows each; `changes` as in adapter__rank=2."""
    settings = {
        "model.name": str(model),
        "model.dtype": "float32",
        "model.device": "cpu",
        "data.name": str(data[0]),
        "data.eval_file": str(data[1]),
        "adapter.rank": 3,
        "train.epochs": 3,
        "train.batch_size": 3,
        "train.learning_rate": 0.02,
        "decode.max_new_tokens": 9,
        "identify.windows": 1,
        "identify.window_tokens": 32,
    }
    return load_spec(None, settings | {k.replace("__", "."): v for k, v in changes.items()})


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


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same_adapters(one: Path, other: Path) -> bool:
    a, b = adapter_weights(one), adapter_weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
    ids = list(prompt.encode())
    for _ in range(n):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    text = tokenizer.decode(ids[len(prompt.encode()) :], skip_special_tokens=True)
    return " ".join(text.split())
