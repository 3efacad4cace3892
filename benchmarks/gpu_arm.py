"""Run one arm of the GPU benchmark in this process and write what was measured as JSON.

    python -m benchmarks.gpu_arm ours --shape smollm2-135m --device cuda --json F

Every arm trains LoRA (r = 4) on all linear maps with random base weights of the shape, bfloat16 on
CUDA with float32 adapters, fused AdamW. Seconds are those of all steps but the first two, with all
that was asked of the device done at either end.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_models, measure
from benchmarks.arms import LEARNING_RATE, LORA_ALPHA, LORA_RANK
from benchmarks.token_rows import TokenRows

N_WARMUP = 2
PACK_SHARE = 4  # of row_tokens in a pack of the peers, whose mask grows with its square


@dataclass(frozen=True)
class Plan:
    """How much an arm runs; `row_tokens` are those of a tree or of a packed batch."""

    device: str
    rows_a_step: int
    n_steps: int
    row_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one arm on a GPU.")
    parser.add_argument("name", choices=list(ARMS))
    parser.add_argument("--shape", required=True, choices=list(gpu_models.SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=512, help="rows a step")
    parser.add_argument("--steps", type=int, default=12, help="the first two are not timed")
    parser.add_argument("--row-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=Path, help="rows of E2E as token ids")
    parser.add_argument("--long", type=int, default=0, help="rows of so many tokens, unshared")
    parser.add_argument("--json", required=True, type=Path)
    args = parser.parse_args()
    args.json.write_text(json.dumps(measured(args)), encoding="utf-8")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Run the arm and return its result."""
    plan = Plan(args.device, args.rows, args.steps, args.row_tokens)
    model = gpu_models.random_model(args.shape, plan.device)
    n_rows, vocab_size = plan.rows_a_step * plan.n_steps, model.config.vocab_size
    if args.long:
        rows, what = gpu_models.unshared_rows(n_rows, args.long, vocab_size), "made: unshared"
    else:
        rows, what = gpu_models.e2e_rows(args.tokens, n_rows, vocab_size)
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = ARMS[args.name](model, rows, plan)
    quick = {} if plan.device == "cuda" else {"n": 256, "repeats": 3}  # a dry run
    peak = measure.gemm_flops(model.dtype, device=plan.device, **quick)
    if flops := found.pop("necessary_flops", None):
        found["share_of_peak"] = flops / found["steady_s"] / peak
    memory = torch.cuda.max_memory_allocated() if plan.device == "cuda" else None
    facts = {"name": args.name, "shape": args.shape, "rows_are": what, **asdict(plan)}
    return {**facts, "gemm_flops": peak, "peak_bytes": memory, **found, **_rates(found)}


def _rates(found: dict[str, Any]) -> dict[str, float]:
    seconds = found["steady_s"]
    return {
        "examples_per_s": found["rows_run"] / seconds,
        "tokens_per_s": found["tokens_run"] / seconds,
        "step_ms": 1e3 * seconds / found["steps_timed"],
    }


class Clock:
    """The time between the end of the warm-up and the end, with the device done at both."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ticks: list[float] = []

    def tick(self) -> None:
        """Note the end of a step, or of the work."""
        if self.device == "cuda" and len(self.ticks) in (0, N_WARMUP - 1):
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())

    def steady_s(self) -> float:
        """Return the seconds of all steps behind the warm-up; call it when all is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - self.ticks[N_WARMUP - 1]


def ours(model: Any, rows: TokenRows, plan: Plan, *, flat: bool = False) -> dict[str, Any]:
    """Train by swlora's own loop."""
    from unittest.mock import patch

    from benchmarks import flat as unshared
    from swlora.adapters.methods import adapt, train_mode
    from swlora.config import AdapterSpec, TrainSpec
    from swlora.data.prefix_tree import build_tree
    from swlora.data.token_sequences import TokenSequences
    from swlora.models.anatomy import Anatomy
    from swlora.training import step as training_step
    from swlora.training.schedule import Schedule, step_plan

    anatomy = Anatomy(model)
    sequences = TokenSequences(rows.tokens, rows.offsets, rows.trained)
    spec = TrainSpec(
        batch_size=plan.rows_a_step,
        epochs=1,
        learning_rate=LEARNING_RATE,
        row_tokens=plan.row_tokens,
    )
    layers = list(range(anatomy.n_layers))
    adapted = adapt(model, AdapterSpec(rank=LORA_RANK, alpha=LORA_ALPHA), layers, seed=0)
    train_mode(adapted.model)
    steps = step_plan(sequences, spec, 0)(0)
    if flat:
        steps = unshared.steps(sequences, steps, plan.row_tokens)
    build = unshared.tree if flat else build_tree
    said: list[str] = []
    with patch.object(training_step, "build_tree", build):
        step = training_step.make_step(adapted.model, sequences, spec, said.append)
        schedule = Schedule(spec, lambda _epoch: steps, len(steps))
        losses, steady_s = _loop(step, schedule, adapted, plan)
        busy = busy_share(lambda: step(steps[-1]), plan.device)
    step.close()
    trees = [[build(sequences, ids) for ids in groups] for groups in steps[N_WARMUP:]]
    from swlora.training.necessary_work import necessary_flops

    timed = [tree for groups in trees for tree in groups]
    n_nodes = sum(len(tree.token_ids) for tree in timed)
    n_scored = sum(len(np.unique(tree.target_position)) for tree in timed)
    ids = np.concatenate([tree.sequence_ids for tree in timed])
    return {
        "steady_s": steady_s,
        "steps_timed": len(trees),
        "rows_run": len(ids),
        "tokens_run": int(sequences.lengths[ids].sum()),
        "nodes_run": n_nodes,
        "trees_a_step": len(timed) / len(trees),
        "necessary_flops": necessary_flops(anatomy, 0, n_nodes, n_scored, prefix_read=False),
        "busy_share": busy,
        "train_loss": losses[-1],
        "said": said,
    }


def _loop(step: Any, schedule: Any, adapted: Any, plan: Plan) -> tuple[list[float], float]:
    from swlora.progress import Silent
    from swlora.run_record import MemoryRecord
    from swlora.training.loop import train

    clock = Clock(plan.device)

    class Ticking(Silent):
        def advance(self, amount: float = 1.0, note: str = "") -> None:  # noqa: ARG002
            if amount:
                clock.tick()

    record = MemoryRecord()
    train(step, schedule, adapted, record, Ticking())
    steady_s = clock.steady_s()
    return [m["loss"] for m in record.metrics() if "loss" in m], steady_s


def peft(model: Any, rows: TokenRows, plan: Plan, *, packed: bool = False) -> dict[str, Any]:
    """Train by PEFT in a plain loop: rows padded in length groups, or one packed row a batch."""
    from benchmarks.gpu_peers import packed_batches, padded_batches
    from benchmarks.trainer_steps import with_adapters

    peft_model = with_adapters(model, None).train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    batches = packed_batches if packed else padded_batches
    n_tokens_at_once = plan.row_tokens // (PACK_SHARE if packed else 1)
    clock, losses, every = Clock(plan.device), [], rows.items()

    def one_step(number: int) -> None:
        start = number * plan.rows_a_step
        items = every[start : start + plan.rows_a_step]
        n_tokens = sum(label >= 0 for item in items for label in item["labels"][1:])
        for batch in batches(items, n_tokens_at_once, plan.device):
            with torch.autocast(plan.device, torch.bfloat16, enabled=plan.device == "cuda"):
                loss = peft_model(**batch, num_items_in_batch=n_tokens).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    for number in range(plan.n_steps):
        one_step(number)
        clock.tick()
    steady_s = clock.steady_s()
    timed = rows.lengths[N_WARMUP * plan.rows_a_step :]
    return {
        "steady_s": steady_s,
        "steps_timed": plan.n_steps - N_WARMUP,
        "rows_run": len(timed),
        "tokens_run": sum(timed),
        "busy_share": busy_share(lambda: one_step(plan.n_steps - 1), plan.device),
        "last_batch_loss": float(losses[-1]),
    }


def trl(model: Any, rows: TokenRows, plan: Plan) -> dict[str, Any]:
    """Train by TRL's SFTTrainer with packed rows."""
    from benchmarks.gpu_peers import trl_packed

    return trl_packed(model, rows, plan.row_tokens // PACK_SHARE, plan.device, Clock(plan.device))


def busy_share(run: Callable[[], Any], device: str) -> float | None:
    """Return the share of a step's time in which the GPU computed; None on a CPU."""
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        start_s = time.perf_counter()
        run()
        torch.cuda.synchronize()
        wall_s = time.perf_counter() - start_s
    kernels_us = sum(e.self_device_time_total for e in profiled.key_averages())
    return kernels_us / 1e6 / wall_s


ARMS: dict[str, Callable[[Any, TokenRows, Plan], dict[str, Any]]] = {
    "ours": ours,
    "ours-flat": lambda *args: ours(*args, flat=True),
    "peft-padded": peft,
    "peft-packed": lambda *args: peft(*args, packed=True),
    "trl-packed": trl,
}

if __name__ == "__main__":
    main()
