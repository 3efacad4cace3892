"""A short training, what it leaves, and whether one that was broken off comes to the same."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.conftest import TINY
from tests.support.recorded_files import plain_name
from tests.support.small_runs import write_data
from tests.support.tokenizers import byte_tokenizer

from swlora import pipeline
from swlora.config import RunSpec
from swlora.errors import UserError
from swlora.job import Job
from swlora.progress import Progress, Silent
from swlora.runs import Run, read_run

LAYERS = "last:1"  # with states below it for the prefix cache
STEPS = 4
# What depends on the clock alone
TIMES = re.compile(r'"(elapsed_s|[a-z]+_per_s|(busy|peak)_share|eval_s|crc32)": [^,}]+,? ?')


def write_inputs(folder: Path) -> dict[str, Any]:
    """Write a tiny model and its data; return the settings of a training with them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY["llama"]))
    model.save_pretrained(folder / "model")
    byte_tokenizer(bos_token="<s>", pad_token="</s>").save_pretrained(folder / "model")
    return {
        "model.name": str(folder / "model"),
        "model.device": "cpu",
        "model.dtype": "float32",
        "model.threads": 1,
        "adapter.layers": LAYERS,
        "adapter.rank": 3,
        "train.batch_size": 3,
        "train.max_steps": STEPS,
        "train.learning_rate": 0.01,
        "train.save_every": "1step",
        **write_data(folder),
    }


@dataclass(frozen=True)
class Outcome:
    """What a training leaves: the names of its files, the adapters' bytes, the metrics."""

    names: frozenset[str]
    adapters: dict[str, bytes]
    metrics: str

    @classmethod
    def of(cls, run: Path) -> "Outcome":
        """Read the outcome of the run in a folder."""
        files = {p.relative_to(run).as_posix(): p for p in run.rglob("*") if p.is_file()}
        adapters = {
            name: path.read_bytes()
            for name, path in files.items()
            if name.startswith(("adapter/", "best/", "predictions"))
        }
        metrics = TIMES.sub("", files["metrics.jsonl"].read_text(encoding="utf-8"))
        return cls(frozenset(files), adapters, metrics)

    def difference(self, run: Path) -> str | None:
        """Say in what the run in a folder came to something else; None where it did not."""
        if (status := read_run(run)["status"]) != "done":
            return f"its status is {status}"
        other = Outcome.of(run)
        if others := other.names ^ self.names:
            return f"files that are too many or missing: {', '.join(sorted(others))}"
        for name, content in self.adapters.items():
            if other.adapters[name] != content:
                return f"{name} has other bytes"
        return None if other.metrics == self.metrics else "its metrics are others"


def train_in(run: Path, spec: RunSpec, progress: Progress | None = None) -> None:
    """Train in a new run folder."""
    with Run.create(run, spec, "train") as begun:
        pipeline.train(Job(spec, begun, progress or Silent()))


def go_on(run: Path, spec: RunSpec, progress: Progress | None = None) -> None:
    """Do what a person does after a kill: resume the run, or start it where none had begun."""
    try:
        reopened, settings = Run.reopen(run, "train")
    except UserError as error:
        if "is done" in str(error):
            return
        if "holds no run" not in str(error) and "before it began" not in str(error):
            raise
        train_in(run, spec, progress)
        return
    with reopened:
        pipeline.train(Job(settings, reopened, progress or Silent()))


def summary(files: dict[str, bytes | None]) -> frozenset[tuple[str, str]]:
    """Tell folders apart by what matters to a run that goes on from them, times left out."""
    return frozenset((plain_name(name), _summary(name, files[name])) for name in files)


def _summary(name: str, content: bytes | None) -> str:
    if content is None:
        return "folder"
    if name.endswith(("run.json", "result.json")):
        try:
            facts = json.loads(content)
        except ValueError:
            return f"{len(content) > 0} torn"
        return f"{facts.get('status')} {sorted(facts)}"
    if name.endswith("metrics.jsonl"):
        return TIMES.sub("", content.decode())
    return str(hash(content))
