"""What the arms share that train with the Trainer of transformers, of whichever stack.

Nothing here needs swlora: the arm of a peer with an environment of its own imports it too.
"""

import time
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from benchmarks import measure
from benchmarks.arms import LEARNING_RATE, LORA_ALPHA, LORA_RANK, PACKED_ROW_TOKENS, Arm
from benchmarks.length_groups import length_grouped
from benchmarks.token_rows import IGNORED

ORIGINAL_TOKENS = 512
N_WARMUP = 1
# The linear maps of a Llama block
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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

    def __init__(self, pad_id: int, length: int | None = None) -> None:
        self.pad_id, self.length = pad_id, length

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = self._pad([row["input_ids"] for row in rows], self.pad_id)
        mask = self._pad([[1] * len(row["input_ids"]) for row in rows], 0)
        labels = self._pad([row["labels"] for row in rows], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        padded = pad_sequence(
            [torch.tensor(r) for r in rows], batch_first=True, padding_value=value
        )
        missing = (self.length or 0) - padded.shape[1]
        return torch.nn.functional.pad(padded, (0, missing), value=value) if missing > 0 else padded


def with_adapters(model: Any, arm: Arm | None) -> Any:
    """Return the model with PEFT's LoRA on every linear map of the arm's layers, or of all."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        target_modules=TARGETS,
        layers_to_transform=list(arm.layers) if arm and arm.layers else None,
    )
    return get_peft_model(model, config)


def picked_rows(arm: Arm, lengths: list[int], n_rows: int) -> list[int]:
    """Return the numbers of the pool's rows in the order in which they are run."""
    if arm.layout == "packed":  # best-fit packing sorts for itself; one more step to warm up
        step_rows = arm.batch * PACKED_ROW_TOKENS * len(lengths) // sum(lengths)
        return list(range(min(len(lengths), n_rows + N_WARMUP * step_rows)))
    longest, *timed = length_grouped(lengths, arm.batch, max(1, n_rows // arm.batch))
    # What is compiled may be compiled again for another shape or mask: each comes once before.
    batches = [longest, *(timed if arm.compiled else ()), *timed]
    return [i for batch in batches for i in batch]


def settings(arm: Arm, dtype: torch.dtype, scratch: str) -> dict[str, Any]:
    """Return the arguments of the Trainer: nothing is logged or saved, and AdamW is fused."""
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


def sft_trainer(
    arm: Arm, model: Any, tokenizer: Any, rows: list[dict[str, Any]], scratch: str
) -> Any:
    """Return TRL's trainer on rows of `prompt` and `completion`, or of `input_ids` and `labels`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    packed = arm.layout == "packed"
    config = SFTConfig(
        **settings(arm, model.dtype, scratch),
        completion_only_loss=True,
        max_length=PACKED_ROW_TOKENS if packed else None,
        packing=packed,
        padding_free=arm.layout == "padding-free",
    )
    dataset = Dataset.from_list(rows)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=dataset, processing_class=tokenizer
    )
    if "labels" in rows[0]:
        _check_labels(trainer, PadRight(tokenizer.pad_token_id)(rows[: arm.batch]))
    return trainer


def _check_labels(trainer: Any, expected: dict[str, torch.Tensor]) -> None:
    """Raise SystemExit where the first batch of the trainer is not what it was handed."""
    batch = next(iter(trainer.get_train_dataloader()))
    for name in ("labels", "attention_mask"):
        if not torch.equal(batch[name], expected[name]):
            raise SystemExit(f"the trainer's {name} are not those of the rows that it was handed")


def train(
    arm: Arm, trainer: Any, clock: TickCallback, lengths: list[int], picked: list[int]
) -> dict[str, Any]:
    """Train on the rows `picked` of those that `lengths` counts; return what was measured."""
    dtype, layers = trainer.model.dtype, arm.layers
    trainer.add_callback(clock)
    gemm_before = measure.gemm_flops(dtype)
    memory = measure.Memory()
    start_s = time.perf_counter()
    output = trainer.train()
    facts = {"memory": memory.report(), "dtype": str(dtype).removeprefix("torch.")}
    epoch = _epoch(arm, clock.ticks, trainer, lengths, picked)
    return {
        **facts,
        "layers": list(layers or range(trainer.model.config.num_hidden_layers)),
        "train_loss": float(output.training_loss),
        "gemm_flops": max(gemm_before, measure.gemm_flops(dtype)),
        "epochs": [epoch],
        "one_off_s": {"start": clock.ticks[0] - start_s, "warmup": epoch["warmup_s"]},
    }


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
    n_warmup = N_WARMUP + (len(documents) - N_WARMUP) // 2 if arm.compiled else N_WARMUP
    report = measure.rates(ticks, [len(d) for d in documents], run_tokens, n_warmup)
    return {**report, "tokens": sum(sum(d) for d in documents[n_warmup:])}
