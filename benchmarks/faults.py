"""What swlora survives: kills, power cuts, damage, hostile input. One row for each promise.

python -m benchmarks.faults --json F [--quick] [--rows kills,damage]

Trainings of a tiny model, float32, one thread. A row is good where all of what was tried is; what
was not is listed under it. --quick tries some of each, for every day; docs/results/faults.json has
the long form. Exit code 1 where a row is not good.
"""

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import runner


@dataclass(frozen=True)
class Row:
    """What came of the trials of one promise: `good` of `tried`, and what went wrong otherwise."""

    promise: str
    good: int
    tried: int
    failures: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def kills(folder: Path, *, quick: bool) -> Row:
    """Kill real processes of every kind of training at random moments, and resume them."""
    from tests.support.fault_trials import write_inputs
    from tests.support.kills import CASES, kill_and_resume, prepare_case

    settings, n_trials = write_inputs(folder), 1 if quick else 13
    n_killed, failures = dict.fromkeys([*CASES, "two on one cache"], 0), []

    def trial(case: Any, name: str, number: int, cache: Path) -> None:
        place = folder / f"{name}-{number}"
        place.mkdir()
        drawn = random.Random(f"{name} {number}")
        n, difference = kill_and_resume(case, place, cache, drawn, n_kills=1 + number % 3)
        n_killed[name.removesuffix(" (second)")] += n
        if difference:
            failures.append(f"{name}, trial {number}: {difference}")

    for name in CASES:
        case = prepare_case(name, settings, folder / name)
        for number in range(n_trials):  # every other time with a cache that is filled already
            trial(case, name, number, folder / f"cache-{number // 2}")
    case = prepare_case("lora", settings, folder / "shared")
    with ThreadPoolExecutor(2) as both:
        for number in range(n_trials):
            names = ("two on one cache", "two on one cache (second)")
            cache = folder / f"shared-cache-{number}"
            list(both.map(lambda name: trial(case, name, number, cache), names))  # noqa: B023
    n_all = sum(n_killed.values())
    return Row(
        "a training killed at a random moment resumes to the same bytes",
        n_all - len(failures),
        n_all,
        failures,
        {"kills": n_killed},
    )


def kill_points(folder: Path, *, quick: bool) -> Row:
    """Go on from every point between two file operations, killed there or without power."""
    from tests.support.fault_trials import write_inputs
    from tests.support.kill_points import check_kill_points

    settings = write_inputs(folder)
    changes: list[dict[str, Any]] = [{"train.eval_every_steps": 2}]
    if not quick:
        changes += [{"train.eval_every_steps": 0, "train.keep_checkpoints": 1}]
        changes += [{"adapter.method": "pissa"}]
    found = []
    for number, change in enumerate(changes):
        (folder / str(number)).mkdir()
        found.append(check_kill_points(settings | change, folder / str(number)))
    failures = [line for one in found for line in one.failures]
    n_distinct = sum(one.n_distinct for one in found)
    return Row(
        "every point between two file operations leaves a run that goes on, and no stray file",
        n_distinct - len(failures),
        n_distinct,
        failures,
        {"points": [one.n_points for one in found], "left": [one.n_left for one in found]},
    )


def damage(folder: Path, *, quick: bool) -> Row:
    """Flip bits and cut files of run, checkpoint, adapter, cache and metrics."""
    from tests.support.damage import damage_all
    from tests.support.fault_trials import write_inputs

    found = damage_all(write_inputs(folder), folder, *((2, 1) if quick else (20, 8)))
    return Row(
        "a flipped bit or a cut in any file is noticed or harmless",
        found.n_good,
        found.n,
        found.failures,
    )


def hostile_inputs(folder: Path, *, quick: bool) -> Row:
    """Give commands models, adapters, data, configurations and runs that cannot be."""
    from tests.support import hostile_inputs as inputs

    whole, place = inputs.prepare_inputs(folder), folder / "hostile"
    place.mkdir()
    tried = inputs.try_inputs(whole, place, every=12 if quick else 1)
    return Row(
        "a hostile model, adapter, data set, configuration or run: one line, < 5 s, < 1 GB",
        sum(not one.wrong for one in tried),
        len(tried),
        [one.wrong for one in tried if one.wrong],
        {
            "most_seconds": round(max(one.seconds for one in tried), 2),
            "most_bytes": max(one.peak_bytes for one in tried),
            "timed": "in processes that have imported the libraries already",
        },
    )


def hostile_folders(folder: Path, *, quick: bool) -> Row:
    """Put folders that hold anything at all under --runs, and ask for every route."""
    from tests.support.fault_trials import write_inputs
    from tests.support.hostile_folders import KINDS, WHOLE, spoiled_folders, wrong_answers
    from tests.support.servers import in_process

    write_inputs(folder)
    files = ("run.json", "adapter_config.json") if quick else tuple(WHOLE)
    bad = spoiled_folders(folder / "runs", KINDS[::3] if quick else KINDS, files)
    with in_process(folder / "model", folder / "runs") as (client, _):
        answers = list(wrong_answers(client, bad))
    failures = [wrong for wrong in answers if wrong]
    return Row(
        "beside hostile folders under --runs, every other route answers 200",
        len(answers) - len(failures),
        len(answers),
        failures,
        {"folders": len(bad)},
    )


def requests(folder: Path, *, quick: bool) -> Row:
    """Ask a server for strange things, leave its answers unread, and send half of requests."""
    from tests.support.fault_trials import write_inputs
    from tests.support.strained_server import LONG, QUICK, strain

    write_inputs(folder)
    found = strain(folder / "model", folder / "runs", QUICK if quick else LONG)
    return Row(
        "strange requests, clients that leave and slow ones: no 5xx, no ticket left, memory < 3 %",
        found.n - len(found.failures),
        found.n,
        found.failures,
        found.more(),
    )


def steps(folder: Path, *, quick: bool) -> Row:
    """Train many steps: memory, open files and threads stay what they were after a tenth."""
    from tests.support.fault_trials import write_inputs
    from tests.support.long_runs import MAX_GROWTH, held_in_training

    n_steps = 200 if quick else 5_000
    held = held_in_training(write_inputs(folder), folder, n_steps)
    first, last = held[0], held[-1]
    growth = last.memory_bytes / first.memory_bytes
    failures = [f"memory grew to {growth:.3f} of what it was"] if growth >= MAX_GROWTH else []
    failures += [f"{last.files} open files, {first.files} before"] * (last.files > first.files)
    failures += [f"{last.threads} threads, {first.threads} before"] * (last.threads > first.threads)
    return Row(
        f"{n_steps:,} steps: memory grows by less than 3 %, files and threads not at all",
        3 - len(failures),
        3,
        failures,
        {"growth": round(growth, 4), "held": [asdict(one) for one in held]},
    )


ROWS: dict[str, Callable[..., Row]] = {
    "kills": kills,
    "kill_points": kill_points,
    "damage": damage,
    "hostile_inputs": hostile_inputs,
    "hostile_folders": hostile_folders,
    "requests": requests,
    "steps": steps,
}


def main() -> None:
    """Measure the rows that were asked for, print them, and write them down."""
    parser = argparse.ArgumentParser(description="What swlora survives.")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="some trials of each")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    args = parser.parse_args()
    names = args.rows.split(",")
    if unknown := set(names) - ROWS.keys():
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    from swlora.files import write_json

    logging.getLogger("swlora.web").setLevel(logging.ERROR)  # it says what it refuses

    results, is_good = {}, True
    for name in names:
        with tempfile.TemporaryDirectory(prefix="swlora-faults-") as scratch:
            os.environ["SWLORA_CACHE"] = str(Path(scratch) / "cache")
            start_s = time.monotonic()
            row = ROWS[name](Path(scratch), quick=args.quick)
        command = f"python -m benchmarks.faults {'--quick ' * args.quick}--rows {name} --json F"
        seconds = round(time.monotonic() - start_s, 1)
        results[name] = asdict(row) | {"seconds": seconds, "command": command}
        print(f"{row.good} of {row.tried}  {row.promise}  ({seconds:.0f} s)", flush=True)
        for line in row.failures:
            print(f"    {line}", flush=True)
        is_good &= row.good == row.tried
        write_json(args.json, {"benchmark": "faults", "machine": runner.machine(), "rows": results})
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
