"""Run one arm of a case in this process and write what was measured as JSON.

    python -m benchmarks.scenario_arm peft --model FOLDER --tokens F --batch 8 --rows 16 --json F

Called by `benchmarks.scenarios` and `benchmarks.sizes`; Unsloth's arms by the Python of their own
environment, which has no swlora.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.arms import SCENARIO_ARMS
from benchmarks.token_rows import TokenRows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one arm of a case.")
    parser.add_argument("name", choices=list(SCENARIO_ARMS))
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--tokens", required=True, type=Path, help="the rows, as TokenRows")
    parser.add_argument("--batch", required=True, type=int, help="rows a step")
    parser.add_argument("--rows", required=True, type=int, help="rows that are timed")
    parser.add_argument("--layers", help="comma-separated numbers of the adapted ones (all)")
    parser.add_argument("--dtype", help="of Unsloth's weights: what swlora chooses here")
    parser.add_argument("--json", required=True, type=Path)
    args = parser.parse_args()
    args.json.write_text(json.dumps(measured(args)), encoding="utf-8")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Run the arm and return its result."""
    from benchmarks import measure

    layers = tuple(map(int, args.layers.split(","))) if args.layers else None
    arm = replace(SCENARIO_ARMS[args.name], batch=args.batch, layers=layers)
    start, rows = measure.machine_state(), TokenRows.load(args.tokens)
    if arm.kind == "unsloth":
        from benchmarks import unsloth_peer

        result = unsloth_peer.run(arm, args.model, rows, args.rows, args.dtype)
    elif arm.kind == "ours":
        from benchmarks import ours
        from swlora.data.token_sequences import TokenSequences

        timed = rows.first(args.rows + arm.batch)  # one step to warm up
        sequences = TokenSequences(timed.tokens, timed.offsets, timed.trained)
        result = ours.run_sequences(arm, args.model, lambda _: sequences)
    else:
        from benchmarks import peers

        result = peers.run_rows(arm, args.model, lambda _: rows, args.rows)
    import torch

    threads = {"threads": torch.get_num_threads()}
    return {**asdict(arm), **threads, "start": start, **result, "end": measure.machine_state()}


if __name__ == "__main__":
    main()
