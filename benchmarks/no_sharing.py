"""The case that prefix trees were not made for: no prompt occurs twice, one epoch.

    python -m benchmarks.no_sharing [--quick] --json F [--e2e FOLDER]

One reference of every meaning representation of E2E, shuffled, as a JSONL file; ours against PEFT
+ Trainer, all layers. What is left to share are the words with which prompts happen to begin.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from benchmarks import runner
from benchmarks.rows import find_e2e, load

PEERS = ("peft-8", "peft-16", "peft-32")
OURS = ("ours-32", "ours-64")


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed where no prompt is shared.")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    parser.add_argument("--rounds", type=int, help="how often every arm is run (1 quick, else 3)")
    parser.add_argument("--rows", type=int, help="rows that every arm is timed on")
    args = parser.parse_args()

    n_rounds = args.rounds or (1 if args.quick else 3)
    turns, start = runner.Turns(), runner.load()
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        data = Path(scratch) / "unshared.jsonl"
        n_prompts = write_unshared(find_e2e(args.e2e), data)
        where = ["--model", runner.builtin_model(), "--data", str(data)]
        sizes = {name: args.rows or (96 if args.quick else 384) for name in PEERS}
        sizes |= {name: args.rows or (320 if args.quick else 1600) for name in OURS}
        jobs = {n: ("benchmarks.arm", [n, *where, "--rows", str(k)]) for n, k in sizes.items()}
        turns.run(jobs, n_rounds)
    summary = runner.summarise(turns.rounds)
    rates = {n: one["epochs"][0]["examples_per_s"] for n, one in summary.items() if "epochs" in one}
    best = max((rates[n] for n in PEERS if n in rates), default=None)
    report = {
        "benchmark": "no_sharing",
        "machine": runner.machine(),
        "load_average": {"start": start, "end": runner.load()},
        "distinct_prompts": n_prompts,
        "ratios": {f"{n}_vs_best_peft": rates[n] / best for n in OURS if n in rates and best},
        "arms": summary,
        "rounds": turns.rounds,
    }
    from swlora.files import write_json

    write_json(args.json, report)
    lines = [
        (n, f"{one['epochs'][0]['examples_per_s']:.2f}",
         f"{one['epochs'][0]['tokens_run'] / one['epochs'][0]['rows']:.1f}",
         f"{one['peak_bytes'] / 1e9:.2f}")
        if "epochs" in one else (n, one["error"], "", "")
        for n, one in summary.items()
    ]  # fmt: skip
    print(runner.table(("arm", "examples/s", "tokens/row", "peak GB"), lines))
    for name, value in report["ratios"].items():
        print(f"{name}: {value:.3f}")


def write_unshared(e2e: Path, target: Path, seed: int = 0) -> int:
    """Write one row of every distinct prompt, shuffled; return how many there are."""
    dataset = load(e2e)
    first = {row.prompt: row for row in reversed(dataset.train)}
    rows = sorted(first.values(), key=lambda row: row.prompt)
    random.Random(seed).shuffle(rows)
    with target.open("w", encoding="utf-8") as file:
        for row in rows:
            pair = {"prompt": row.prompt + dataset.separator, "completion": row.completion}
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    return len(rows)


if __name__ == "__main__":
    main()
