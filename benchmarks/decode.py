"""Generation speed: `swlora.evaluation.decode.generate` against a plain `generate` loop.

    python -m benchmarks.decode [--quick] --json F [--e2e FOLDER] [--adapter FOLDER]

Distinct dev prompts of E2E with an adapter, greedy and with ten beams, each way in processes of
its own and in turns. Texts are compared too: with bfloat16 and other padding, near ties may fall
the other way, so the share of equal texts is reported and not demanded.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import runner
from benchmarks.rows import find_e2e

PROMPTS = {1: (96, 547), 10: (24, 96)}  # beams: prompts of a quick, of a full run


def main() -> None:
    parser = argparse.ArgumentParser(description="Generation speed.")
    parser.add_argument("--quick", action="store_true", help="one round over fewer prompts")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--e2e", type=Path, help="folder with devset.csv (default: SWLORA_E2E)")
    parser.add_argument("--adapter", type=Path, help="adapter folder (default: train a small one)")
    parser.add_argument("--num-beams", default="1,10", help="comma-separated")
    parser.add_argument("--prompts", type=int, help="prompts to generate for, whatever the beams")
    parser.add_argument("--rows", type=int, help="rows that the small adapter is trained on")
    parser.add_argument("--rounds", type=int, help="how often each way is run (1 quick, else 3)")
    args = parser.parse_args()

    beams = [int(part) for part in args.num_beams.split(",")]
    where = ["--model", runner.builtin_model(), "--data", str(find_e2e(args.e2e))]
    start = runner.load()
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        adapter = args.adapter or _small_adapter(Path(scratch) / "run", where, args)
        turns = runner.Turns()
        jobs = {}
        for n in beams:
            count = args.prompts or PROMPTS.get(n, PROMPTS[10])[0 if args.quick else 1]
            options = ["--adapter", str(adapter.resolve()), "--num-beams", str(n)]
            for what in ("plain", "ours"):
                job = [what, *where, *options, "--prompts", str(count)]
                jobs[f"{what}, {n} beams"] = ("benchmarks.decode_arm", job)
        turns.run(jobs, args.rounds or (1 if args.quick else 3))
    report = {
        "benchmark": "decode",
        "machine": runner.machine(),
        "load_average": {"start": start, "end": runner.load()},
        "ratios": {_name(n): _compare(turns.rounds, n) for n in beams},
        "rounds": turns.rounds,
    }
    from swlora.files import write_json

    write_json(args.json, report)
    for name, found in report["ratios"].items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()))


def _small_adapter(folder: Path, where: list[str], args: argparse.Namespace) -> Path:
    n_rows = args.rows or (640 if args.quick else 2560)
    options = ["--out", str(folder), "--rows", str(n_rows)]
    result = runner.run_module("benchmarks.decode_arm", ["adapter", *where, *options])
    if "error" in result:
        raise SystemExit(f"no adapter could be trained: {result['error']}")
    return folder


def _name(n_beams: int) -> str:
    return "greedy" if n_beams == 1 else f"beams_{n_beams}"


def _compare(rounds: list[dict[str, Any]], n_beams: int) -> dict[str, Any]:
    """Return medians over the rounds, their ratio and the share of equal texts."""
    results = {w: [r[f"{w}, {n_beams} beams"] for r in rounds] for w in ("plain", "ours")}
    for runs in results.values():
        if failed := [run["error"] for run in runs if "error" in run]:
            return {"error": failed[0]}
    rates = {
        w: runner.middle([run["epochs"][0]["examples_per_s"] for run in runs])
        for w, runs in results.items()
    }
    plain, ours = (results[w][0]["texts"] for w in ("plain", "ours"))
    equal = sum(a.strip() == b.strip() for a, b in zip(plain, ours, strict=True))
    return {
        "ours_vs_plain": rates["ours"] / rates["plain"],
        "ours_examples_per_s": rates["ours"],
        "plain_examples_per_s": rates["plain"],
        "prompts": len(plain),
        "equal_texts": equal / len(plain),
    }


if __name__ == "__main__":
    main()
