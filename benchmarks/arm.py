"""Run one arm in this process and write what was measured as JSON.

    python -m benchmarks.arm ours-32 --model FOLDER --data FOLDER --rows 640 --json F

Called by the benchmarks, which start every arm in a process of its own.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.arms import ARMS, POOL_ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one arm.")
    parser.add_argument("name", choices=list(ARMS))
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, type=Path, help="E2E folder or .jsonl file")
    parser.add_argument("--rows", required=True, type=int, help="rows that are timed")
    parser.add_argument("--epochs", type=int, help="passes over the rows, where not the arm's own")
    parser.add_argument("--json", required=True, type=Path)
    args = parser.parse_args()

    from swlora.files import write_json

    write_json(args.json, measured(args))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Run the arm and return its result."""
    from dataclasses import asdict, replace

    import torch

    from benchmarks import measure, rows

    arm = ARMS[args.name]
    if args.epochs:
        arm = replace(arm, epochs=args.epochs)
    start = measure.machine_state()
    dataset = rows.load(args.data)
    n_rows = min(args.rows + arm.batch, len(dataset.train))  # one step to warm up
    pool = rows.pool(dataset.train, max(n_rows, min(POOL_ROWS, len(dataset.train))))
    if arm.kind == "ours":
        from benchmarks import ours

        result = ours.run(arm, args.model, dataset.separator, pool[:n_rows])
    else:
        from benchmarks import peers

        result = peers.run(arm, args.model, dataset.separator, pool, args.rows)
    threads = {"threads": torch.get_num_threads()}
    return {**asdict(arm), **threads, "start": start, **result, "end": measure.machine_state()}


if __name__ == "__main__":
    main()
