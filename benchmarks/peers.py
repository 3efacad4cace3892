"""The arms of other stacks: the original recipe, PEFT + transformers Trainer, TRL SFTTrainer.

Each at the settings that suit it: bfloat16 weights with float32 adapters (what PEFT makes of a
bfloat16 model) under autocast (5 to 12 % faster than without: the adapters then multiply in
bfloat16 too), loss on completions only, no gradient checkpointing, no logging, no saving, fused
AdamW, batches grouped by length. The original recipe is what microsoft/LoRA did: float32, eight
rows a step, every row padded to 512 tokens.
"""

import tempfile
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from benchmarks import measure
from benchmarks.arms import LEARNING_RATE, LORA_ALPHA, LORA_RANK, PACKED_ROW_TOKENS, Arm
from benchmarks.rows import length_grouped
from swlora.data.encode import encode_examples
from swlora.data.examples import Example

ORIGINAL_TOKENS = 512
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N_WARMUP = 1


class TickCallback(TrainerCallback):
    """Notes when the training began and when each optimizer step ended."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.ticks.append(time.perf_counter())

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.ticks.append(time.perf_counter())


class PadRight:
    """Right-pads token ids and labels to the longest row of a batch, or to `length`."""

    def __init__(self, pad_id: int, length: int | None) -> None:
        self.pad_id, self.length = pad_id, length

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = self._pad([row["input_ids"] for row in rows], self.pad_id)
        mask = self._pad([[1] * len(row["input_ids"]) for row in rows], 0)
        labels = self._pad([row["labels"] for row in rows], -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        padded = pad_sequence(
            [torch.tensor(r) for r in rows], batch_first=True, padding_value=value
        )
        missing = (self.length or 0) - padded.shape[1]
        return torch.nn.functional.pad(padded, (0, missing), value=value) if missing > 0 else padded


def run(
    arm: Arm,
    model_folder: str,
    separator: str,
    pool: list[Example],
    n_rows: int,
    clock: TickCallback | None = None,
) -> dict[str, Any]:
    """Train on about `n_rows` rows of the pool; return what was measured."""
    watch, clock = measure.Stopwatch(), clock or TickCallback()
    dtype = torch.float32 if arm.kind == "original" else _fast_dtype()
    with watch("load_model"):
        model = _with_adapters(AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype), arm)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
    encode_watch = measure.Stopwatch()
    with encode_watch("tokenise"):
        items = _encode(pool, separator, tokenizer)
    lengths = [len(item["input_ids"]) for item in items]
    picked = _pick(arm, lengths, n_rows)
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        if arm.kind == "trl":
            with watch("tokenise"):  # its own, and the packing
                rows = [pool[i] for i in picked]
                trainer = _sft_trainer(arm, model, tokenizer, rows, separator, scratch)
            tokenise_row_s = watch.seconds.pop("tokenise") / len(picked)
        else:
            tokenise_row_s = encode_watch.seconds["tokenise"] / len(pool)
            rows = [items[i] for i in picked]
            trainer = _trainer(arm, model, tokenizer, rows, scratch)
        trainer.add_callback(clock)
        gemm_before = measure.gemm_flops(dtype)
        memory = measure.Memory()
        start_s = time.perf_counter()
        output = trainer.train()
    facts = {"memory": memory.report(), "dtype": str(dtype).removeprefix("torch.")}
    epoch = _epoch(arm, clock.ticks, trainer, lengths, picked)
    one_off = {"start": clock.ticks[0] - start_s, "warmup": epoch["warmup_s"]}
    return {
        **facts,
        "layers": list(arm.layers or range(model.config.num_hidden_layers)),
        "train_loss": float(output.training_loss),
        "gemm_flops": max(gemm_before, measure.gemm_flops(dtype)),
        "epochs": [epoch],
        "one_off_s": {**watch.seconds, **one_off},
        "per_row_s": {"tokenise": tokenise_row_s},
    }


def _fast_dtype() -> torch.dtype:
    from swlora.models.precision import resolve_dtype

    return resolve_dtype("auto", "cpu")


def _with_adapters(model: Any, arm: Arm) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        target_modules=TARGETS,
        layers_to_transform=list(arm.layers) if arm.layers else None,
    )
    return get_peft_model(model, config)


def _encode(pool: list[Example], separator: str, tokenizer: Any) -> list[dict[str, list[int]]]:
    limits = {"context_tokens": ORIGINAL_TOKENS, "truncate": False}
    sequences = encode_examples(pool, separator, tokenizer, **limits).sequences
    items = []
    for start, end in pairwise(sequences.offsets.tolist()):
        ids, trained = sequences.tokens[start:end], sequences.weights[start:end] > 0
        items.append({"input_ids": ids.tolist(), "labels": np.where(trained, ids, -100).tolist()})
    return items


def _pick(arm: Arm, lengths: list[int], n_rows: int) -> list[int]:
    """Return the numbers of the pool's rows in the order in which they are run."""
    if arm.layout == "packed":  # best-fit packing sorts for itself; one more step to warm up
        step_rows = arm.batch * PACKED_ROW_TOKENS * len(lengths) // sum(lengths)
        return list(range(min(len(lengths), n_rows + N_WARMUP * step_rows)))
    batches = length_grouped(lengths, arm.batch, max(1, n_rows // arm.batch))
    return [i for batch in batches for i in batch]


def _settings(arm: Arm, dtype: torch.dtype, scratch: str) -> dict[str, Any]:
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": arm.batch,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "train_sampling_strategy": "sequential",  # the rows come grouped by length
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "bf16": dtype == torch.bfloat16,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }


def _trainer(arm: Arm, model: Any, tokenizer: Any, rows: list[Any], scratch: str) -> Any:
    length = ORIGINAL_TOKENS if arm.kind == "original" else None
    return Trainer(
        model=model,
        args=Arguments(**_settings(arm, model.dtype, scratch), remove_unused_columns=False),
        train_dataset=rows,
        data_collator=PadRight(tokenizer.pad_token_id, length),
    )


def _sft_trainer(
    arm: Arm, model: Any, tokenizer: Any, rows: list[Example], separator: str, scratch: str
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [{"prompt": row.prompt + separator, "completion": row.completion} for row in rows]
    packed = arm.layout == "packed"
    config = SFTConfig(
        **_settings(arm, model.dtype, scratch),
        completion_only_loss=True,
        max_length=PACKED_ROW_TOKENS if packed else None,
        packing=packed,
        padding_free=arm.layout == "padding-free",
    )
    dataset = Dataset.from_list(texts)
    return SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)


def _epoch(
    arm: Arm, ticks: list[float], trainer: Any, lengths: list[int], picked: list[int]
) -> dict[str, Any]:
    """Summarise the steps: rows of the data set and tokens, as run and as they are."""
    batch = arm.batch
    if arm.layout == "packed":
        packs = trainer.train_dataset["seq_lengths"]
        documents = [[n for pack in packs[i : i + batch] for n in pack] for i in
                     range(0, len(packs), batch)]  # fmt: skip
    else:
        documents = [[lengths[k] for k in picked[i : i + batch]] for i in
                     range(0, len(picked), batch)]  # fmt: skip
    if arm.kind == "original":
        run_tokens = [ORIGINAL_TOKENS * len(d) for d in documents]
    elif arm.layout == "padded":
        run_tokens = [max(d) * len(d) for d in documents]
    else:
        run_tokens = [sum(d) for d in documents]
    report = measure.rates(ticks, [len(d) for d in documents], run_tokens, N_WARMUP)
    return {**report, "tokens": sum(sum(d) for d in documents[N_WARMUP:])}
