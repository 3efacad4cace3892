"""How much of the idle machine's rate is left beside other programs.

    python -m benchmarks.busy [--arms A,B] [--rounds N] --json F

Every arm works without a pause in a process of its own, while none, one and two programs run that
do nothing but compute, each with one thread. The rates are of the same process, so only the other
programs differ. `train`, `eval` and the servers adapt their threads; those with `-fixed` use as
many as there are cores, whatever happens; `peft` is PEFT with the Trainer of transformers, and
`unsloth` Unsloth's SFTTrainer, by the Python of its own environment (`--unsloth-python`).
Changes are counted from the moment at which the other programs start: finding out is included.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from benchmarks import cases, runner
from benchmarks.rows import find_e2e

BUSY = "while True: pass"
PHASES = (0, 1, 2)  # other programs
REST_S = 5.0  # between two phases, nothing measured
SERVED_TOKENS = 32
ARMS = (
    *("train", "train-fixed", "peft", "unsloth", "eval", "eval-fixed"),
    *("serve-1", "serve-1-fixed", "serve-8", "serve-8-fixed"),
)


class Log:
    """How far a worker was at which time of the monotonic clock."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def units_at(self, t_s: float) -> float:
        """Return how much was done at `t_s`, straight lines between what was said."""
        before = max(p for p in self.points if p[0] <= t_s)
        after = min((p for p in self.points if p[0] > t_s), default=None)
        if after is None:
            raise SystemExit("the worker said nothing after the last phase")
        share = (t_s - before[0]) / (after[0] - before[0])
        return before[1] + share * (after[1] - before[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="The rate beside other programs.")
    parser.add_argument("--json", required=True, type=Path, help="where the results go")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--rounds", type=int, default=3, help="how often every arm is run")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each phase")
    parser.add_argument("--e2e", type=Path, help="folder with trainset.csv (default: SWLORA_E2E)")
    parser.add_argument(
        "--unsloth-python", help=f"of its environment (default: {cases.UNSLOTH_VARIABLE})"
    )
    args = parser.parse_args()

    names = args.arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        raise SystemExit(f"no arm is called {unknown[0]!r}; there are {', '.join(ARMS)}")
    start, model, data = runner.load(), runner.builtin_model(), find_e2e(args.e2e)
    cases.find_unsloth(args)
    rounds: list[dict[str, list[float]]] = []
    for number in range(args.rounds):
        rounds.append({})
        for name in names:
            if name == "unsloth" and (reason := cases.missing(name, args.unsloth_python)):
                print(f"{name}: {reason}", file=sys.stderr, flush=True)
                continue
            rates = measured(name, model, data, args)
            rounds[-1][name] = rates
            said = ", ".join(f"{rate:.2f}" for rate in rates)
            print(f"round {number + 1}/{args.rounds}  {name}: {said}", file=sys.stderr, flush=True)
    names = [name for name in names if name in rounds[0]]
    arms = {name: summary([one[name] for one in rounds]) for name in names}
    report = {
        "benchmark": "busy",
        "machine": runner.machine(),
        "load_average": {"start": start, "end": runner.load()},
        "seconds_a_phase": args.seconds,
        "other_programs": list(PHASES),
        "arms": arms,
        "rounds": rounds,
    }
    from swlora.files import write_json

    write_json(args.json, report)
    lines = [
        (name, *(f"{rate:.2f}" for rate in arm["rates"]), *(f"{r:.2f}" for r in arm["ratios"][1:]))
        for name, arm in arms.items()
    ]
    header = ("arm", "idle", "1 program", "2 programs", "1 : idle", "2 : idle")
    print(runner.table(header, lines))


def summary(rounds: list[list[float]]) -> dict[str, list[float]]:
    """Return the medians of the rates, and of each round's ratios to its idle rate."""
    ratios = [[rate / rates[0] for rate in rates] for rates in rounds]
    return {
        "rates": [statistics.median(column) for column in zip(*rounds, strict=True)],
        "ratios": [statistics.median(column) for column in zip(*ratios, strict=True)],
    }


def measured(name: str, model: str, data: Path, args: argparse.Namespace) -> list[float]:
    """Return an arm's units a second beside 0, 1 and 2 other programs."""
    is_fixed = name.endswith("-fixed")
    threads = ["--threads", str(len(os.sched_getaffinity(0)))] if is_fixed else []
    kind = name.removesuffix("-fixed")
    if kind.startswith("serve-"):
        with serving(model, int(kind.removeprefix("serve-")), threads) as log:
            return phases(log, args.seconds)
    command = ["-m", "benchmarks.busy_arm", kind, "--model", model, "--data"]
    if kind == "unsloth":
        command[2:2] = ["--dtype", cases.fast_dtype()]
        return measured_unsloth([args.unsloth_python, *command], model, args)
    with working([sys.executable, *command, str(data), *threads]) as log:
        return phases(log, args.seconds)


def measured_unsloth(command: list[str], model: str, args: argparse.Namespace) -> list[float]:
    """Return Unsloth's rates; its environment has no swlora, so it is handed token ids."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        path = Path(scratch) / "rows.npz"
        cases.e2e_rows(AutoTokenizer.from_pretrained(model), args).save(path)
        with working([*command, str(path)]) as log:
            return phases(log, args.seconds)


def phases(log: Log, seconds: float) -> list[float]:
    """Wait until the work runs, then measure it beside each number of other programs."""
    _wait_for(log, 3)
    times = []
    for n_busy in PHASES:
        with busy(n_busy):
            start_s = time.monotonic()
            time.sleep(seconds)
            times.append((start_s, time.monotonic()))
        time.sleep(REST_S)
    _wait_for(log, len(log.points) + 1)
    return [(log.units_at(b) - log.units_at(a)) / (b - a) for a, b in times]


def _wait_for(log: Log, n_points: int, timeout_s: float = 180.0) -> None:
    end_s = time.monotonic() + timeout_s
    while len(log.points) < n_points:
        if time.monotonic() > end_s:
            raise SystemExit("a worker says nothing; run its command by hand to see why")
        time.sleep(0.1)


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Run `n` programs that do nothing but compute, in one thread each."""
    programs = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(n)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@contextmanager
def working(command: list[str]) -> Iterator[Log]:
    """Run a worker; the log fills while the body runs."""
    process = subprocess.Popen(
        command,
        cwd=runner.ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    log = Log()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            t_s, units = line.split()
            log.points.append((float(t_s), float(units)))

    threading.Thread(target=read, daemon=True).start()
    try:
        yield log
    finally:
        process.kill()
        process.wait()


@contextmanager
def serving(model: str, n_clients: int, threads: list[str]) -> Iterator[Log]:
    """Serve the model to `n_clients` that ask without a pause; the log counts their tokens."""
    import httpx2

    from benchmarks import serve

    log, stop, lock = Log(), threading.Event(), threading.Lock()
    with serve.serving(model, threads) as url:

        def ask(prompts: Iterator[str]) -> None:
            with httpx2.Client(base_url=url, trust_env=False, timeout=300) as client:
                name = client.get("/v1/models").json()["data"][0]["id"]
                while not stop.is_set():
                    answer = serve.stream(client, name, next(prompts), SERVED_TOKENS)
                    with lock:
                        done = log.points[-1][1] if log.points else 0.0
                        log.points.append((time.monotonic(), done + answer["tokens"]))

        with ThreadPoolExecutor(n_clients) as pool:
            for i in range(n_clients):
                pool.submit(ask, cycle(serve.PROMPTS[i:] + serve.PROMPTS[:i]))
            try:
                yield log
            finally:
                stop.set()


if __name__ == "__main__":
    main()
