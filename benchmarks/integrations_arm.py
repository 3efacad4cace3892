"""Run one loop with one drop-in, or without, in this process and write what was measured as JSON.

    python -m benchmarks.integrations_arm own tree --model FOLDER --tokens F --batch 16 --steps 4
        --json F

Called by `benchmarks.integrations`, which starts every arm in a process of its own.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

import swlora
from benchmarks import measure
from benchmarks.arms import LEARNING_RATE, Arm
from benchmarks.integrations import DROP_INS, LOOPS
from benchmarks.token_rows import TokenRows
from benchmarks.trainer_steps import PadRight, TickCallback, settings, with_adapters

SEED = 0


class Noted:
    """A collator that notes the rows and the tokens, padding left out, of every batch."""

    def __init__(self, collate: Callable[[Any], dict[str, torch.Tensor]]) -> None:
        self._collate = collate
        self.rows: list[int] = []
        self.tokens: list[int] = []

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        self.rows.append(len(rows))
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self._collate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a drop-in.")
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("drop_in", choices=DROP_INS)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--tokens", required=True, type=Path, help="the rows, as TokenRows")
    parser.add_argument("--batch", required=True, type=int, help="rows a step")
    parser.add_argument("--steps", required=True, type=int, help="steps that are timed")
    parser.add_argument("--json", required=True, type=Path)
    args = parser.parse_args()
    args.json.write_text(json.dumps(measured(args)), encoding="utf-8")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Run the steps; return rates over all of them.

    A step on the two shortest rows goes before, and is not timed.
    """
    start = measure.machine_state()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = with_adapters(model, None).train()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = TokenRows.load(args.tokens).items()
    collate = Noted(PadRight(tokenizer.pad_token_id))
    loss_of = _loss(args.drop_in)
    patched = swlora.patch(model) if args.drop_in == "patch" else None
    shortest = sorted(rows, key=lambda row: len(row["input_ids"]))[:2]
    loss_of(model, collate(shortest)).backward()
    model.zero_grad()
    collate.rows, collate.tokens = [], []
    memory = measure.Memory()
    if args.loop == "own":
        ticks, loss = _own_loop(model, rows, collate, loss_of, args)
    else:
        ticks, loss = _trainer(model, tokenizer, rows, collate, args)
    if patched:
        patched.undo()
    n = args.steps
    epoch = measure.rates(ticks, collate.rows[:n], collate.tokens[:n], 0)
    epoch["tokens_per_s"] = epoch["tokens_run"] / epoch["steady_s"]
    return {
        "start": start,
        "threads": torch.get_num_threads(),
        "epochs": [epoch],
        "train_loss": loss,
        **memory.report(),
        "end": measure.machine_state(),
    }


def _loss(drop_in: str) -> Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]:
    if drop_in.startswith("tree"):
        return lambda model, batch: swlora.tree_loss(model, **batch)
    return lambda model, batch: model(**batch, use_cache=False).loss  # type: ignore[no-any-return]


def _own_loop(
    model: Any, rows: list[Any], collate: Noted, loss_of: Any, args: argparse.Namespace
) -> tuple[list[float], float]:
    """The loop that everybody writes; returns when each step ended, and the mean loss."""
    if args.drop_in == "tree+sampler":
        sampler: Any = swlora.PrefixSampler(rows, args.batch, seed=SEED)
    else:
        sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(SEED))
    loader = DataLoader(rows, batch_size=args.batch, sampler=sampler, collate_fn=collate)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    ticks, total = [time.perf_counter()], 0.0
    for batch, _ in zip(loader, range(args.steps), strict=False):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ticks.append(time.perf_counter())
        total += float(loss.detach())
    return ticks, total / args.steps


def _trainer(
    model: Any, tokenizer: Any, rows: list[Any], collate: Noted, args: argparse.Namespace
) -> tuple[list[float], float]:
    clock, is_trl = TickCallback(), args.loop == "trl"
    base = _trl_base() if is_trl else _trainer_base()
    kind, config, more = base
    if args.drop_in.startswith("tree"):
        order = "prompts" if args.drop_in == "tree+sampler" else None
        kind = type("Tree", (swlora.TreeTrainerMixin, kind), {"prefix_order": order})
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        arm = Arm("", "peft", args.batch, 0, 0)
        chosen = settings(arm, model.dtype, scratch) | {
            "train_sampling_strategy": "random",
            "max_steps": args.steps,
            "seed": SEED,
        }
        trainer: Any = kind(
            model=model,
            args=config(**chosen, **more),
            train_dataset=_dataset(rows) if is_trl else rows,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        output = trainer.train()
    return clock.ticks, float(output.training_loss)


def _trainer_base() -> tuple[Any, Any, dict[str, Any]]:
    from transformers import Trainer, TrainingArguments

    return Trainer, TrainingArguments, {"remove_unused_columns": False}


def _trl_base() -> tuple[Any, Any, dict[str, Any]]:
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer, SFTConfig, {"max_length": None}


def _dataset(rows: list[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


if __name__ == "__main__":
    main()
