"""What each drop-in gains in the same loop: one's own, transformers' Trainer, TRL's SFTTrainer.

    python -m benchmarks.integrations [--quick] --json F [--rounds N] [--data a,b] [--add]
    python -m benchmarks.integrations --table F    # the Markdown table of a result

The embedded model in bfloat16, LoRA in all layers, on E2E's rows and on chats behind one system
prompt. Batches are drawn at random, but where the sampler draws them. Rates are of the rows' own
tokens, so that padding is no work done. A quick run is one round, five minutes at most.
"""

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import cases, runner
from benchmarks.scenario_data import SCENARIOS, Writer
from benchmarks.token_rows import TokenRows

QUICK_LIMIT_S = 265.0
LOOPS = ("own", "trainer", "trl")
DROP_INS = ("none", "patch", "tree", "tree+sampler")
PROMPT_ROWS = 200  # chats behind the system prompt
# Data: rows a step, steps without trees in a quick run and in a full one; with trees, so many times
# as many
AMOUNTS = {"e2e": (16, 2, 10), "system-prompt": (8, 1, 5)}
TREES = 2
ARMS = [
    *[("own", drop_in) for drop_in in DROP_INS],
    *[(loop, one) for loop in LOOPS[1:] for one in DROP_INS if one != "patch"],
]
NAMES = {
    "own": "a loop of one's own",
    "trainer": "`Trainer`",
    "trl": "`SFTTrainer`",
    "none": "as it is",
    "patch": "`patch`",
    "tree": "`tree_loss`",
    "tree+sampler": "`tree_loss`, `PrefixSampler`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the gain of each drop-in.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--json", type=Path, help="where the results go")
    where.add_argument("--table", type=Path, help="print the table of these results; run nothing")
    parser.add_argument("--quick", action="store_true", help="one short round, five minutes")
    parser.add_argument("--data", help=f"comma-separated, of: {', '.join(AMOUNTS)}")
    parser.add_argument("--add", action="store_true", help="keep the other data that --json has")
    parser.add_argument("--rounds", type=int, help="how often every arm is run (1 quick, else 3)")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    args = parser.parse_args()
    if args.table:
        print(markdown(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    from swlora.files import write_json

    report = measured(cases.named(args.data, AMOUNTS, "data"), args)
    if args.add and args.json.exists():
        report = added(json.loads(args.json.read_text(encoding="utf-8")), report)
    write_json(args.json, report)
    print(markdown(report))


def measured(chosen: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run every arm on the chosen kinds of data; return the report."""
    model, load = runner.builtin_model(), runner.load()
    n_rounds = args.rounds or (1 if args.quick else 3)
    turns = runner.Turns(QUICK_LIMIT_S * n_rounds if args.quick else None)
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        jobs = {}
        for data in chosen:
            path = Path(scratch) / f"{data}.npz"
            _rows(data, model, args).save(path)
            for loop, drop_in in ARMS:
                if not _is_left_out(data, loop, drop_in, args.quick):
                    jobs[f"{data} {loop} {drop_in}"] = _job(
                        data, loop, drop_in, model, path, args.quick
                    )
        turns.run(jobs, n_rounds)
    return {
        "benchmark": "integrations",
        "quick": args.quick,
        "machine": runner.machine(),
        "load_average": {"start": load, "end": runner.load()},
        "wall_s": turns.elapsed_s,
        "arms": {name: _median([one[name] for one in turns.rounds]) for name in jobs},
        "rounds": turns.rounds,
    }


def added(before: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return the report with the data of an earlier one that it has not."""
    new = {name.split(" ")[0] for name in report["arms"]}
    kept = {name: one for name, one in before["arms"].items() if name.split(" ")[0] not in new}
    wall_s = before["wall_s"] + report["wall_s"]
    return {
        **report,
        "arms": kept | report["arms"],
        "rounds": before["rounds"] + report["rounds"],
        "wall_s": wall_s,
    }


def _rows(data: str, model: str, args: argparse.Namespace) -> TokenRows:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if data == "e2e":
        return cases.e2e_rows(tokenizer, args)
    make = SCENARIOS[data].make
    assert make is not None
    return TokenRows.from_parts(make(PROMPT_ROWS, Writer(tokenizer, 0)))


def _is_left_out(data: str, loop: str, drop_in: str, quick: bool) -> bool:
    """Every chat begins alike: a sampler has nothing to do. Quick runs do with fewer arms."""
    if data == "system-prompt":
        return drop_in == "tree+sampler" or (quick and (loop == "trl" or drop_in == "patch"))
    return quick and loop != "own" and drop_in == "tree"


def _job(
    data: str, loop: str, drop_in: str, model: str, path: Path, quick: bool
) -> runner.Job | str:
    if loop == "trl" and importlib.util.find_spec("trl") is None:
        return "trl is not installed: pip install -r benchmarks/requirements.txt"
    batch, n_quick, n_full = AMOUNTS[data]
    n_steps = (n_quick if quick else n_full) * (TREES if drop_in.startswith("tree") else 1)
    arguments = [loop, drop_in, "--model", model, "--tokens", str(path)]
    arguments += ["--batch", str(batch), "--steps", str(n_steps)]
    return runner.Job("benchmarks.integrations_arm", arguments)


def _median(results: list[runner.Result]) -> runner.Result:
    good = [one for one in results if "error" not in one]
    if not good:
        return results[-1]
    rates = [one["epochs"][0]["tokens_per_s"] for one in good]
    return {
        "tokens_per_s": runner.middle(rates),
        "tokens_per_s_range": [min(rates), max(rates)],
        "examples_per_s": runner.middle([one["epochs"][0]["examples_per_s"] for one in good]),
        "steps": good[0]["epochs"][0]["steps"],
        "peak_bytes": runner.middle([one["peak_bytes"] for one in good]),
        "rounds": len(good),
    }


def markdown(report: dict[str, Any]) -> str:
    """Lay out a report as a Markdown table, and what did not run below it."""
    arms, lines, reasons = report["arms"], [], []
    for name, one in arms.items():
        data, loop, drop_in = name.split(" ")
        if "error" in one:
            reasons.append(f"{name}: {one['error']}")
            continue
        plain = arms[f"{data} {loop} none"].get("tokens_per_s")
        gain = f"{one['tokens_per_s'] / plain:.2f}" if plain else "-"
        cells = [data, NAMES[loop], NAMES[drop_in], f"{one['tokens_per_s']:.0f}", gain]
        lines.append(f"| {' | '.join(cells)} | {one['peak_bytes'] / 1e9:.2f} |")
    header = (
        "| data | loop | drop-in | tokens/s | times as fast | peak GB |\n|---|---|---|---|---|---|"
    )
    return "\n".join([header, *lines, *([""] if reasons else []), *reasons])


if __name__ == "__main__":
    main()
