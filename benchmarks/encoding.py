"""Reading, templating and tokenising a file of chats, against datasets.map in two processes.

    python -m benchmarks.encoding --json F [--mb 100] [--rounds 1]

The file is generated: chats of one to six answers behind one of a few system turns, of words drawn
from English text. Both arms take the embedded model's tokenizer and template. `ours` is what a
training does before its first step: examples, each answer's place found and its weight, token
sequences. `datasets` reads the file and maps `apply_chat_template` over batches, to an empty cache,
which gives token ids and no weights. Each arm runs in a fresh process; seconds leave out the
imports and the tokenizer's loading. On a busy machine compare the CPU seconds, which have both.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import runner

ARMS = ("ours", "datasets")
N_PROCESSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds to read and encode a file of chats.")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--mb", type=float, default=100.0, help="size of the file that is made")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    from swlora.files import write_json

    if args.arm:
        measure = {"ours": ours, "datasets": mapped}[args.arm]
        write_json(args.json, measure(args.file, runner.builtin_model()))
        return
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        path = Path(scratch) / "chats.jsonl"
        n_rows = write_chats(path, int(args.mb * 1e6))
        load = runner.load()
        found: dict[str, list[runner.Result]] = {arm: [] for arm in ARMS}
        for _ in range(args.rounds):
            for arm in ARMS:
                given = ["--arm", arm, "--file", str(path)]
                found[arm].append(runner.run_module("benchmarks.encoding", given))
                print(arm, *(f"{key}={value}" for key, value in found[arm][-1].items()), flush=True)
    if any("error" in result for results in found.values() for result in results):
        raise SystemExit("an arm failed, so there is no ratio")
    medians = {arm: statistics.median(r["seconds"] for r in found[arm]) for arm in ARMS}
    ratio = medians["datasets"] / medians["ours"]
    report = {
        "benchmark": "encoding",
        "machine": runner.machine(),
        "load_average": {"start": load, "end": runner.load()},
        "rows": n_rows,
        "ours_vs_datasets": ratio,
        "rounds": found,
    }
    write_json(args.json, report)
    print(f"seconds of datasets / seconds of ours: {ratio:.2f}")


def write_chats(path: Path, n_bytes: int, seed: int = 0) -> int:
    """Write generated chats until the file has `n_bytes`; count the rows."""
    rng = random.Random(seed)
    words = (runner.ROOT / "src/swlora/superweights/english.txt").read_text("utf-8").split()

    def text(least: int, most: int) -> str:
        n = rng.randint(least, most)
        return " ".join(rng.choices(words, k=n)).capitalize() + rng.choice(".?!\n")

    systems, n_rows = [text(20, 60) for _ in range(4)], 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < n_bytes:
            turns = [{"role": "system", "content": rng.choice(systems)}]
            for _ in range(rng.randint(1, 6)):
                turns.append({"role": "user", "content": text(5, 60)})
                turns.append({"role": "assistant", "content": text(10, 150)})
            file.write(json.dumps({"messages": turns}) + "\n")
            n_rows += 1
    return n_rows


def cpu_s() -> float:
    """Return the CPU seconds of this process and of those that it waited for, imports included."""
    return sum(os.times()[:4])


def ours(path: Path, model: str) -> dict[str, Any]:
    """Encode the file as a training does."""
    from transformers import AutoTokenizer

    from swlora.config import DataSpec
    from swlora.data.encode import encode_examples
    from swlora.data.sources import load_dataset

    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    tokenizer, start_s = AutoTokenizer.from_pretrained(model), time.perf_counter()
    dataset = load_dataset(DataSpec(name=str(path)))
    read_s = time.perf_counter() - start_s
    n_tokens = 0
    for split in (dataset.train, dataset.dev):
        encoded = encode_examples(
            split, dataset.separator, tokenizer, context_tokens=8192, truncate=False
        )
        n_tokens += len(encoded.sequences.tokens)
    seconds = time.perf_counter() - start_s
    return {"seconds": seconds, "cpu_s": cpu_s(), "read_s": read_s, "tokens": n_tokens}


def mapped(path: Path, model: str) -> dict[str, Any]:
    """Map the template and the tokenizer over the file, in two processes."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.apply_chat_template(batch["messages"], return_dict=False)}

    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as cache:
        start_s = time.perf_counter()
        read = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        read_s = time.perf_counter() - start_s
        done = read.map(
            encode, batched=True, num_proc=N_PROCESSES, remove_columns=read.column_names
        )
        seconds = time.perf_counter() - start_s
        n_tokens = sum(map(len, done["input_ids"]))
    return {"seconds": seconds, "cpu_s": cpu_s(), "read_s": read_s, "tokens": n_tokens}


if __name__ == "__main__":
    main()
