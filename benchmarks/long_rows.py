"""What one long row takes: seconds and peak memory of a step against its tokens.

    python -m benchmarks.long_rows --json F [--tokens 1024,2048,4096,8192] [--threads N]

One sequence of random tokens, LoRA of rank 4 on every linear map of the embedded model, bfloat16.
Every length runs in a process of its own: one step, loss and gradient. CPU seconds say more than
seconds where other programs run.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure, runner
from benchmarks.arms import LORA_ALPHA, LORA_RANK

TOKENS = "1024,2048,4096,8192"


def main() -> None:
    parser = argparse.ArgumentParser(description="A step over one long row.")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--tokens", default=TOKENS, help=f"lengths of the row ({TOKENS})")
    parser.add_argument("--threads", type=int, help="of torch (default: its own number)")
    parser.add_argument("--arm", action="store_true", help="one length in this process")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(step_of(int(args.tokens), args.threads)))
        return
    from swlora.files import write_json

    start, found = runner.load(), []
    for n_tokens in args.tokens.split(","):
        command = [sys.executable, "-m", "benchmarks.long_rows", "--arm", "--tokens", n_tokens]
        command += ["--threads", str(args.threads)] if args.threads else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(n_tokens, found[-1], flush=True)
    if args.json:
        load = {"start": start, "end": runner.load()}
        about = {"benchmark": "long rows", "machine": runner.machine(), "load_average": load}
        write_json(args.json, {**about, "rows": found})


def step_of(n_tokens: int, threads: int | None) -> dict[str, Any]:
    """Run the loss and gradient of one row of so many tokens; return what it took."""
    import torch

    from swlora.adapters.methods import adapt, train_mode
    from swlora.config import AdapterSpec, ModelSpec, TrainSpec
    from swlora.data.token_sequences import TokenSequences
    from swlora.models.load import load_model
    from swlora.training.step import make_step

    if threads:
        torch.set_num_threads(threads)
    loaded = load_model(ModelSpec(name=runner.builtin_model(), dtype="bfloat16"))
    layers = range(loaded.model.config.num_hidden_layers)
    spec = AdapterSpec(rank=LORA_RANK, alpha=LORA_ALPHA)
    adapted = adapt(loaded.model, spec, list(layers), seed=0)
    train_mode(adapted.model)
    tokens = np.random.default_rng(0).integers(100, 40_000, n_tokens).tolist()
    sequences = TokenSequences.from_lists([(tokens[:1], tokens[1:])])
    step = make_step(adapted.model, sequences, TrainSpec(), print)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    loss = step([np.array([0])])
    return {
        "tokens": n_tokens,
        "threads": torch.get_num_threads(),
        "step_s": time.perf_counter() - start_s,
        "step_cpu_s": time.process_time() - start_cpu_s,
        "peak_bytes": measure.status_bytes("VmHWM"),
        "nats_per_token": loss.nats_per_token,
    }


if __name__ == "__main__":
    main()
