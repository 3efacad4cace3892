"""Memory of one rank of `swlora train --shard` beside that of a single process.

python -m benchmarks.shard_memory --json F [--shape 1.1B] [--dtypes bfloat16,float32]
    [--ranks 2] [--tokens 512] [--steps 2] [--scratch DIR]

A model of random numbers, LoRA of rank 4 on every projection of every layer, rows of `--tokens`
tokens that share nothing, one a rank and step, over gloo. `peak_bytes` is VmHWM of the process,
`private_bytes` the most that was its own. No process makes copies of weights (--memory-gb 0), which
--shard does not make either. Ranks share this machine, so that their seconds say nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measure, runner
from benchmarks.gguf_memory import write_rows
from benchmarks.random_model import SHAPES, write_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of one rank of a sharded training.")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="folder with some 4 GB free")
    parser.add_argument("--arm", type=Path, help="run this training, in this process")
    args = parser.parse_args()
    if args.arm:
        run_arm(args.arm)
        return
    found = measured(args)
    print(json.dumps(found, indent=2))
    if args.json:
        from swlora.files import write_json

        about = {"benchmark": "memory of a shard", "machine": runner.machine()}
        sizes = {name: getattr(args, name) for name in ("shape", "ranks", "tokens", "steps")}
        write_json(args.json, {**about, **sizes, "dtypes": found})


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Write a model and rows, and train in one process and in several, by dtype."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder, rows = Path(scratch) / "base", Path(scratch) / "rows.jsonl"
        write_model(folder, SHAPES[args.shape])
        write_rows(rows, args.steps * args.ranks, args.tokens)
        for dtype in args.dtypes.split(","):
            arms = {}
            for n in (1, args.ranks):
                arm = Path(scratch) / f"{dtype}-{n}"
                arm.mkdir()
                (arm / "flags.json").write_text(json.dumps(flags(folder, rows, dtype, n, args)))
                start = [sys.executable]
                if n > 1:
                    start += ["-m", "torch.distributed.run", "--nproc-per-node", str(n)]
                command = [*start, "-m", "benchmarks.shard_memory", "--arm", str(arm)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                arms[str(n)] = [read_arm(path) for path in sorted(arm.glob("rank-*.json"))]
                print(dtype, n, arms[str(n)], flush=True)
            found[dtype] = arms | {"ratios": ratios(arms["1"][0], arms[str(args.ranks)])}
    return found


def ratios(one: dict[str, Any], ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Return the memory of the rank that takes most over that of the single process."""
    names = ("peak_bytes", "private_bytes")
    return {name: max(rank[name] for rank in ranks) / one[name] for name in names}


def flags(model: Path, rows: Path, dtype: str, n: int, args: argparse.Namespace) -> list[str]:
    """Return the command of a training; the last flag's value is added by the arm."""
    settings = {
        **{"model": model, "dtype": dtype, "device": "cpu", "memory-gb": 0},
        **{"dataset": rows, "eval-file": rows, "eval-every-steps": 0, "epochs": 1},
        **{"layers": "all", "batch-size": args.ranks, "row-tokens": args.tokens},
    }
    said = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["train", *said, *(["--shard"] if n > 1 else []), "--output"]


def run_arm(folder: Path) -> None:
    """Run a training as the command line does, and write down what this process took."""
    from swlora.cli import main as swlora

    command = json.loads((folder / "flags.json").read_text())
    private = measure.PrivatePeak()
    try:
        swlora([*command, str(folder / "run")])
    except SystemExit as ended:
        if ended.code:
            raise
    taken = {"peak_bytes": measure.status_bytes("VmHWM"), "private_bytes": private.stop()}
    (folder / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(taken))


def read_arm(path: Path) -> dict[str, Any]:
    """Return what a process took, and the seconds of its steps but the first."""
    lines = (path.parent / "run" / "metrics.jsonl").read_text().splitlines()
    ends = [0.0, *(json.loads(line)["elapsed_s"] for line in lines)]
    step_s = [after - before for before, after in pairwise(ends)]
    return {**json.loads(path.read_text()), "step_s": median(step_s[1:])}


if __name__ == "__main__":
    main()
