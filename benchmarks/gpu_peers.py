"""How the peers of the GPU benchmark are fed."""

import itertools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.arms import Arm
from benchmarks.token_rows import IGNORED, TokenRows
from benchmarks.trainer_steps import PadRight, settings, with_adapters

Item = dict[str, list[int]]
PAD_ID = 2
PACKS_A_STEP = 8


def padded_batches(items: list[Item], row_tokens: int, device: str) -> Iterator[dict[str, Any]]:
    """Yield rows of similar lengths, padded, as many as have `row_tokens` tokens with padding."""
    pad = PadRight(PAD_ID)
    ordered = sorted(items, key=lambda item: -len(item["input_ids"]))
    while ordered:
        n = max(1, row_tokens // len(ordered[0]["input_ids"]))
        yield {name: x.to(device) for name, x in pad(ordered[:n]).items()}
        ordered = ordered[n:]


def packed_batches(items: list[Item], row_tokens: int, device: str) -> Iterator[dict[str, Any]]:
    """Yield rows behind one another in one, whose positions say where each begins."""
    packs: list[list[Item]] = [[]]
    used = 0
    for item in items:
        length = len(item["input_ids"])
        if packs[-1] and used + length > row_tokens:
            packs.append([])
            used = 0
        packs[-1].append(item)
        used += length
    for pack in packs:
        joined = {
            "input_ids": [i for item in pack for i in item["input_ids"]],
            # The first token of a row is nobody's to predict.
            "labels": [i for item in pack for i in [IGNORED, *item["labels"][1:]]],
            "position_ids": [i for item in pack for i in range(len(item["input_ids"]))],
        }
        yield {name: torch.tensor([values], device=device) for name, values in joined.items()}


def trl_packed(
    model: Any, rows: TokenRows, row_tokens: int, device: str, clock: Any
) -> dict[str, Any]:
    """Train by TRL's SFTTrainer on rows that it packs, eight packed rows a step, one after another.

    Together they would be one row to it, whose mask of all pairs grows with the square of them.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Ticking(TrainerCallback):
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            clock.tick()

    arm = Arm("trl-packed", "trl", 1, 0, 0, layout="packed")
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        own: dict[str, Any] = {"gradient_accumulation_steps": PACKS_A_STEP}
        own |= {"use_cpu": device == "cpu", "dataloader_pin_memory": device == "cuda"}
        config = SFTConfig(
            **settings(arm, model.dtype, scratch) | own,
            max_length=row_tokens,
            packing=True,
        )
        trainer = SFTTrainer(
            model=with_adapters(model, None),
            args=config,
            train_dataset=Dataset.from_list(rows.items()),
            processing_class=_tokenizer(),
        )
        trainer.add_callback(Ticking())
        trainer.train()
        steady_s = clock.steady_s()
    packs = trainer.train_dataset["seq_lengths"]
    steps = [packs[i : i + PACKS_A_STEP] for i in range(0, len(packs), PACKS_A_STEP)][2:]
    lengths = list(itertools.chain.from_iterable(itertools.chain.from_iterable(steps)))
    return {
        "steady_s": steady_s,
        "steps_timed": len(steps),
        "rows_run": len(lengths),
        "tokens_run": sum(lengths),
        "busy_share": None,
    }


def _tokenizer() -> Any:
    """Return a tokenizer with what the trainer asks of one: the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
