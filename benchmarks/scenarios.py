"""Training where people work: the same arms on seven kinds of data, against the best of all peers.

    python -m benchmarks.scenarios [--quick] --json F [--scenarios a,b] [--arms a,b] [--rounds N]
    python -m benchmarks.scenarios --table F       # the Markdown table of a result

The embedded model, LoRA in all layers. Rows go to every arm as the same token ids and labels;
each arm runs in a process of its own, Unsloth's with the Python of its own environment
(`--unsloth-python`, else $SWLORA_UNSLOTH_PYTHON). A quick run is one short round, 20 minutes at
most on two idle cores; in it TRL and the compiled Unsloth, which starts slowly, take part in E2E
only. An arm or scenario that cannot run says why, and the others go on.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import runner
from benchmarks.arms import POOL_ROWS, SCENARIO_ARMS
from benchmarks.rows import find_e2e
from benchmarks.scenario_data import SCENARIOS, Scenario
from benchmarks.scenario_report import markdown, ratios
from benchmarks.token_rows import TokenRows

QUICK_LIMIT_S = 1190.0
# Arms of which a quick run does without in the other scenarios
QUICK_SCENARIOS = dict.fromkeys(("trl", "unsloth-compiled"), ("e2e",))
UNSLOTH_VARIABLE = "SWLORA_UNSLOTH_PYTHON"


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed on seven kinds of data.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--json", type=Path, help="where the results go")
    where.add_argument("--table", type=Path, help="print the table of these results; run nothing")
    parser.add_argument("--quick", action="store_true", help="one short round, 20 minutes at most")
    parser.add_argument("--scenarios", help=f"comma-separated, of: {', '.join(SCENARIOS)}")
    parser.add_argument("--arms", help=f"comma-separated, of: {', '.join(SCENARIO_ARMS)}")
    parser.add_argument("--rounds", type=int, help="how often every arm is run (1 quick, else 3)")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    parser.add_argument(
        "--unsloth-python", help=f"of its environment (default: {UNSLOTH_VARIABLE})"
    )
    args = parser.parse_args()

    if args.table:
        print(markdown(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    scenarios = [SCENARIOS[n] for n in _named(args.scenarios, SCENARIOS, "scenario")]
    arms = _named(args.arms, SCENARIO_ARMS, "arm")
    if given := args.unsloth_python or os.environ.get(UNSLOTH_VARIABLE):
        # Arms run in another folder; a link to the program says which environment it is of.
        args.unsloth_python = os.path.abspath(shutil.which(given) or given)
    from swlora.files import write_json

    report = measured(scenarios, arms, args)
    write_json(args.json, report)
    print(markdown(report))


def measured(scenarios: list[Scenario], arms: list[str], args: argparse.Namespace) -> Any:
    """Run the arms of the scenarios; return the report."""
    n_rounds = args.rounds or (1 if args.quick else 3)
    turns = runner.Turns(QUICK_LIMIT_S * n_rounds if args.quick else None)
    start, model = runner.load(), runner.builtin_model()
    facts: dict[str, dict[str, Any]] = {}
    jobs: dict[str, runner.Job | str] = {}
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        for scenario in scenarios:
            path = Path(scratch) / f"{scenario.name}.npz"
            reason = _write_rows(scenario, path, model, args)
            rows = None if reason else TokenRows.load(path)
            facts[scenario.name] = _facts(scenario, rows)
            for arm in arms_of(scenario, arms, args):
                job = reason or missing(arm, args.unsloth_python)
                jobs[f"{scenario.name} {arm}"] = job or _job(scenario, arm, path, model, args)
        turns.run(jobs, n_rounds)
    return {
        "benchmark": "scenarios",
        "quick": args.quick,
        "machine": runner.machine(),
        "load_average": {"start": start, "end": runner.load()},
        "wall_s": turns.elapsed_s,
        "scenarios": {name: _of_scenario(name, facts[name], turns.rounds) for name in facts},
        "rounds": turns.rounds,
    }


def arms_of(scenario: Scenario, arms: list[str], args: argparse.Namespace) -> list[str]:
    """Return the arms that are run on a scenario; all that `--arms` names, whatever `--quick`."""
    if not args.quick or args.arms:
        return arms
    return [a for a in arms if scenario.name in QUICK_SCENARIOS.get(a, (scenario.name,))]


def missing(arm: str, unsloth_python: str | None) -> str | None:
    """Say what an arm lacks that cannot run, and how to get it."""
    kind = SCENARIO_ARMS[arm].kind
    if kind == "unsloth" and not unsloth_python:
        return (
            f"needs the Python of an environment with Unsloth: --unsloth-python or "
            f"{UNSLOTH_VARIABLE} (pip install torch==2.13.0 unsloth==2026.10.9)"
        )
    if kind == "unsloth" and not shutil.which(str(unsloth_python)):
        return f"there is no program {unsloth_python}"
    if kind in ("peft", "trl") and importlib.util.find_spec(kind) is None:
        return f"{kind} is not installed: pip install -r benchmarks/requirements.txt"
    return None


def _named(names: str | None, known: dict[str, Any], what: str) -> list[str]:
    chosen = names.split(",") if names else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"no {what} is called {unknown[0]!r}; there are {', '.join(known)}")
    return chosen


def _write_rows(scenario: Scenario, path: Path, model: str, args: argparse.Namespace) -> str | None:
    """Write the rows of a scenario; return why that cannot be done."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        if scenario.make is None:
            rows = _e2e_rows(tokenizer, args)
        else:
            rows = scenario.rows(tokenizer, args.quick)
    except SystemExit as error:
        return str(error)
    rows.save(path)
    return None


def _e2e_rows(tokenizer: Any, args: argparse.Namespace) -> TokenRows:
    from benchmarks import peers, rows

    dataset = rows.load(find_e2e(args.e2e))
    return peers.encode(rows.pool(dataset.train, POOL_ROWS), dataset.separator, tokenizer)


def _facts(scenario: Scenario, rows: TokenRows | None) -> dict[str, Any]:
    counts: dict[str, Any] = {"tokens_a_row": None, "trained_a_row": None}
    if rows:
        counts = {
            "tokens_a_row": len(rows.tokens) / len(rows),
            "trained_a_row": int(rows.trained.sum()) / len(rows),
        }
    batches = {"ours_batch": scenario.ours_batch, "peer_batch": scenario.peer_batch}
    return {"title": scenario.title, **batches, **counts}


def _job(
    scenario: Scenario, arm: str, path: Path, model: str, args: argparse.Namespace
) -> runner.Job:
    batch, timed = scenario.amount(arm, args.quick)
    arguments = [arm, "--model", model, "--tokens", str(path)]
    arguments += ["--batch", str(batch), "--rows", str(timed)]
    is_unsloth = SCENARIO_ARMS[arm].kind == "unsloth"
    python = str(args.unsloth_python) if is_unsloth else sys.executable
    return runner.Job("benchmarks.scenario_arm", arguments, python)


def _of_scenario(
    name: str, facts: dict[str, Any], rounds: list[dict[str, runner.Result]]
) -> dict[str, Any]:
    own = [
        {job.split()[1]: one for job, one in results.items() if job.split()[0] == name}
        for results in rounds
    ]
    arms = runner.summarise(own)
    by_round = [ratios(runner.summarise([one])) for one in own]
    return {**facts, "ratios": ratios(arms), "ratios_by_round": by_round, "arms": arms}


if __name__ == "__main__":
    main()
