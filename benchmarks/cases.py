"""What `scenarios` and `sizes` share: the same arms on several cases, and one report of them all.

A case is a model, its adapted layers and its rows, which go to every arm as the same token ids and
labels. Each arm runs in a process of its own, Unsloth's with the Python of its own environment. An
arm that cannot run, or whose memory is not there, says why, and the others go on.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import memory_needs, runner
from benchmarks.arms import POOL_ROWS, SCENARIO_ARMS
from benchmarks.rows import find_e2e
from benchmarks.token_rows import TokenRows

UNSLOTH_VARIABLE = "SWLORA_UNSLOTH_PYTHON"


@dataclass(frozen=True)
class Case:
    """One model on one kind of data.

    `rows` is the file of its rows, or says why there is none; `amounts` has by arm the rows a step
    and the rows that are timed; `layers` None is all of them; `facts` goes into the report.
    """

    name: str  # without spaces
    model: str
    rows: Path | str
    amounts: dict[str, tuple[int, int]]
    layers: tuple[int, ...] | None
    facts: dict[str, Any]


def parser(description: str, of: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark of cases has."""
    made = argparse.ArgumentParser(description=description)
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("--json", type=Path, help="where the results go")
    where.add_argument("--table", type=Path, help="print the table of these results; run nothing")
    made.add_argument("--quick", action="store_true", help=f"one short round, {of}")
    made.add_argument("--add", action="store_true", help="keep the other cases that --json has")
    made.add_argument("--arms", help=f"comma-separated, of: {', '.join(SCENARIO_ARMS)}")
    made.add_argument("--rounds", type=int, help="how often every arm is run (1 quick, else 3)")
    made.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    made.add_argument("--unsloth-python", help=f"of its environment (default: {UNSLOTH_VARIABLE})")
    return made


def find_unsloth(args: argparse.Namespace) -> None:
    """Let the arguments name Unsloth's Python by its whole path, where one is given."""
    if given := args.unsloth_python or os.environ.get(UNSLOTH_VARIABLE):
        # Arms run in another folder; a link to the program says which environment it is of.
        args.unsloth_python = os.path.abspath(shutil.which(given) or given)


def named(names: str | None, known: Sequence[str] | dict[str, Any], what: str) -> list[str]:
    """Return the names that an option lists, all that are known where it was not given."""
    chosen = names.split(",") if names else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"no {what} is called {unknown[0]!r}; there are {', '.join(known)}")
    return chosen


def e2e_rows(tokenizer: Any, args: argparse.Namespace) -> TokenRows:
    """Return the pool of E2E's rows; SystemExit where E2E is not there."""
    from benchmarks import peers, rows

    dataset = rows.load(find_e2e(args.e2e))
    return peers.encode(rows.pool(dataset.train, POOL_ROWS), dataset.separator, tokenizer)


def row_facts(rows: TokenRows | None) -> dict[str, float | None]:
    """Return the tokens of a row on average, and how many of them are trained."""
    if rows is None:
        return {"tokens_a_row": None, "trained_a_row": None}
    return {
        "tokens_a_row": len(rows.tokens) / len(rows),
        "trained_a_row": int(rows.trained.sum()) / len(rows),
    }


def run(
    benchmark: str,
    cases: Sequence[Case],
    args: argparse.Namespace,
    ratios: Callable[[dict[str, dict[str, Any]]], dict[str, Any]],
    limit_s: float,
) -> dict[str, Any]:
    """Run every arm of every case; return the report, with what `ratios` makes of each case's arms.

    A quick run ends after `limit_s` seconds a round.
    """
    n_rounds = args.rounds or (1 if args.quick else 3)
    turns = runner.Turns(limit_s * n_rounds if args.quick else None)
    start = runner.load()
    jobs = {
        f"{case.name} {arm}": job(case, arm, args.unsloth_python)
        for case in cases
        for arm in case.amounts
    }
    turns.run(jobs, n_rounds)
    load = {"load_average": {"start": start, "end": runner.load()}}
    return {
        "benchmark": benchmark,
        "quick": args.quick,
        "machine": runner.machine(),
        "wall_s": turns.elapsed_s,
        benchmark: {case.name: load | _of_case(case, turns.rounds, ratios) for case in cases},
        "rounds": turns.rounds,
    }


def publish(report: dict[str, Any], args: argparse.Namespace, table: Callable[..., str]) -> None:
    """Write a report to --json, with the other cases that are there for --add; print its table."""
    from swlora.files import write_json

    if args.add and args.json.exists():
        report = added(json.loads(args.json.read_text(encoding="utf-8")), report)
    write_json(args.json, report)
    print(table(report))


def added(before: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return the report with the cases of an earlier one that it has not."""
    name = report["benchmark"]
    rounds = [
        {job: one for job, one in results.items() if job.split()[0] not in report[name]}
        for results in before["rounds"]
    ]
    cases, wall_s = before[name] | report[name], before["wall_s"] + report["wall_s"]
    return {**report, "wall_s": wall_s, name: cases, "rounds": rounds + report["rounds"]}


def job(case: Case, arm: str, unsloth_python: str | None) -> runner.Job | str:
    """Return the job of an arm, or why it is not started."""
    if isinstance(case.rows, str):
        return case.rows
    batch, timed = case.amounts[arm]
    if reason := missing(arm, unsloth_python) or _too_large(case, arm):
        return reason
    arguments = [arm, "--model", case.model, "--tokens", str(case.rows)]
    arguments += ["--batch", str(batch), "--rows", str(timed)]
    if case.layers is not None:
        arguments += ["--layers", ",".join(map(str, case.layers))]
    is_unsloth = SCENARIO_ARMS[arm].kind == "unsloth"
    if is_unsloth:
        arguments += ["--dtype", fast_dtype()]
    python = str(unsloth_python) if is_unsloth else sys.executable
    return runner.Job("benchmarks.scenario_arm", arguments, python)


def fast_dtype() -> str:
    """Return the dtype that swlora and the other arms choose on this machine."""
    from swlora.models.precision import resolve_dtype

    return str(resolve_dtype("auto", "cpu")).removeprefix("torch.")


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


def _too_large(case: Case, name: str) -> str | None:
    from swlora.memory import available_bytes

    assert isinstance(case.rows, Path)
    batch, timed = case.amounts[name]
    arm = replace(SCENARIO_ARMS[name], batch=batch, layers=case.layers)
    rows = TokenRows.load(case.rows)
    if arm.kind == "ours":
        rows = rows.first(batch + timed)
    return memory_needs.refusal(arm, memory_needs.Shape.of(case.model), rows, available_bytes())


def _of_case(
    case: Case,
    rounds: list[dict[str, runner.Result]],
    ratios: Callable[[dict[str, dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    own = [
        {job.split()[1]: one for job, one in results.items() if job.split()[0] == case.name}
        for results in rounds
    ]
    arms = runner.summarise(own)
    by_round = [ratios(runner.summarise([one])) for one in own]
    return {**case.facts, "ratios": ratios(arms), "ratios_by_round": by_round, "arms": arms}
