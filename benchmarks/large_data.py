"""Data larger than memory: what loading, tokenising and planning of a large file take.

    python -m benchmarks.large_data --gb 4 --json F [--e2e FOLDER]

A JSONL file of E2E's rows, each prompt numbered so that no two copies share it; then what `swlora
train` does with it before its first step (but for hashing it for a cache of states), and the first
steps' rows. Reported are the seconds and the most memory of the process's own: pages of mapped
files, which the system takes back when it needs them, are not that.
"""

import argparse
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import runner
from benchmarks.measure import Stopwatch, status_bytes
from benchmarks.rows import find_e2e, load

STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and seconds to prepare a large file.")
    parser.add_argument("--gb", type=float, default=1.0, help="size of the file that is made")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    args = parser.parse_args()

    from swlora.files import write_json

    model = runner.builtin_model()
    with tempfile.TemporaryDirectory(prefix="swlora-bench-", dir=Path.cwd()) as scratch:
        os.environ["SWLORA_CACHE"] = str(Path(scratch) / "cache")
        path = Path(scratch) / "rows.jsonl"
        n_rows = write_rows(find_e2e(args.e2e), path, int(args.gb * 1e9))
        file_bytes = path.stat().st_size
        print(f"{n_rows:,} rows, {file_bytes / 1e9:.2f} GB", flush=True)
        report = {
            "benchmark": "large_data",
            "machine": runner.machine(),
            "rows": n_rows,
            "file_bytes": file_bytes,
            **prepare(path, model),
        }
    write_json(args.json, report)
    for name, seconds in report["seconds"].items():
        print(f"{name:10} {seconds:8.1f} s   {report['own_bytes'][name] / 1e9:6.2f} GB at most")


def write_rows(e2e: Path, target: Path, n_bytes: int) -> int:
    """Write numbered copies of E2E's training rows until the file has `n_bytes`; count the rows."""
    examples, n_rows, copy = load(e2e).train, 0, 0
    with target.open("w", encoding="utf-8") as file:
        while file.tell() < n_bytes:
            for example in examples:
                pair = {"prompt": f"{example.prompt} {copy}\n", "completion": example.completion}
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                n_rows += 1
            copy += 1
    return n_rows


def prepare(path: Path, model: str) -> dict[str, Any]:
    """Do what a training does before its first step, and build the first steps' rows."""
    from transformers import AutoTokenizer

    from swlora.config import DataSpec, TrainSpec
    from swlora.data.encode import encode_examples
    from swlora.data.prefix_tree import build_tree
    from swlora.data.sources import load_dataset
    from swlora.training.schedule import step_plan

    tokenizer = AutoTokenizer.from_pretrained(model)
    watch, memory = Stopwatch(), OwnMemory()
    with watch("load"), memory("load"):
        dataset = load_dataset(DataSpec(name=str(path)))
    with watch("tokenise"), memory("tokenise"):
        sequences = encode_examples(
            dataset.train, dataset.separator, tokenizer, context_tokens=8192, truncate=False
        ).sequences
    with watch("plan"), memory("plan"):
        steps = step_plan(sequences, TrainSpec(batch_size=32), 0)(0)
    with watch("rows"), memory("rows"):
        n_nodes = sum(len(build_tree(sequences, ids).token_ids) for s in steps[:STEPS] for ids in s)
    return {
        "train_rows": len(dataset.train),
        "tokens": len(sequences.tokens),
        "steps": len(steps),
        "nodes_of_100_steps": n_nodes,
        "seconds": watch.seconds,
        "own_bytes": memory.peak_bytes,
        "own_bytes_before": memory.before_bytes,
    }


class OwnMemory:
    """The most anonymous memory of the process by name, asked for every 20 ms."""

    def __init__(self) -> None:
        self.before_bytes = status_bytes("RssAnon")
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            self.peak_bytes[name] = status_bytes("RssAnon")
            while not done.wait(0.02):
                self.peak_bytes[name] = max(self.peak_bytes[name], status_bytes("RssAnon"))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


if __name__ == "__main__":
    main()
