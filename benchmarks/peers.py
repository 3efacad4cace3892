"""The arms of other stacks: the original recipe, PEFT + transformers Trainer, TRL SFTTrainer.

Each at the settings that suit it: bfloat16 weights with float32 adapters (what PEFT makes of a
bfloat16 model) under autocast (5 to 12 % faster than without: the adapters then multiply in
bfloat16 too), loss on completions only, no gradient checkpointing, no logging, no saving, fused
AdamW, batches grouped by length. The original recipe is what microsoft/LoRA did: float32, eight
rows a step, every row padded to 512 tokens.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers import TrainingArguments as Arguments

from benchmarks import measure
from benchmarks.arms import Arm
from benchmarks.token_rows import TokenRows
from benchmarks.trainer_steps import (
    ORIGINAL_TOKENS,
    PadRight,
    TickCallback,
    picked_rows,
    settings,
    sft_trainer,
    train,
    with_adapters,
)
from swlora.data.encode import encode_examples
from swlora.data.examples import Example


def run(
    arm: Arm,
    model_folder: str,
    separator: str,
    pool: list[Example],
    n_rows: int,
    clock: TickCallback | None = None,
) -> dict[str, Any]:
    """Train on about `n_rows` rows of the pool; return what was measured."""
    texts = [{"prompt": row.prompt + separator, "completion": row.completion} for row in pool]

    def encoded(tokenizer: Any) -> TokenRows:
        return encode(pool, separator, tokenizer)

    return run_rows(arm, model_folder, encoded, n_rows, clock, texts if arm.kind == "trl" else None)


def run_rows(
    arm: Arm,
    model_folder: str,
    rows_of: Callable[[Any], TokenRows],
    n_rows: int,
    clock: TickCallback | None = None,
    texts: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train on about `n_rows` of the rows that `rows_of` makes with the model's tokenizer.

    Where `texts` are given, one a row, the trainer is handed them and tokenises by itself.
    """
    watch, encode_watch = measure.Stopwatch(), measure.Stopwatch()
    dtype = torch.float32 if arm.kind == "original" else _fast_dtype()
    with watch("load_model"):
        model = with_adapters(AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype), arm)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with encode_watch("tokenise"):
        rows = rows_of(tokenizer)
        items: list[dict[str, Any]] = texts or rows.items()
    picked = picked_rows(arm, rows.lengths, n_rows)
    chosen = [items[i] for i in picked]
    tokenise_row_s = encode_watch.seconds["tokenise"] / len(rows)
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        if arm.kind == "trl":
            with watch("tokenise"):  # its own, and the packing
                trainer = sft_trainer(arm, model, tokenizer, chosen, scratch)
            tokenise_row_s = watch.seconds.pop("tokenise") / len(picked)
        else:
            trainer = _trainer(arm, model, tokenizer, chosen, scratch)
        result = train(arm, trainer, clock or TickCallback(), rows.lengths, picked)
    result["one_off_s"] = {**watch.seconds, **result["one_off_s"]}
    return {**result, "per_row_s": {"tokenise": tokenise_row_s}}


def _fast_dtype() -> torch.dtype:
    from swlora.models.precision import resolve_dtype

    return resolve_dtype("auto", "cpu")


def encode(pool: list[Example], separator: str, tokenizer: Any) -> TokenRows:
    """Tokenise examples and mark their completions as trained."""
    limits = {"context_tokens": ORIGINAL_TOKENS, "truncate": False}
    sequences = encode_examples(pool, separator, tokenizer, **limits).sequences
    return TokenRows(sequences.tokens, sequences.offsets, sequences.weights > 0)


def _trainer(arm: Arm, model: Any, tokenizer: Any, rows: list[Any], scratch: str) -> Any:
    length = ORIGINAL_TOKENS if arm.kind == "original" else None
    return Trainer(
        model=model,
        args=Arguments(**settings(arm, model.dtype, scratch), remove_unused_columns=False),
        train_dataset=rows,
        data_collator=PadRight(tokenizer.pad_token_id, length),
    )
