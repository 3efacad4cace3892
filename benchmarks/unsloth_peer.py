"""The arm of Unsloth, which runs in an environment of its own, without what swlora needs.

    python -m venv unsloth && unsloth/bin/pip install torch==2.13.0 unsloth==2026.10.9

(and `unsloth/bin/pip uninstall torchvision`, where that is not made for this torch). On a CPU it is
stock transformers, PEFT and TRL with a chunked cross entropy; weights in the dtype that is fast on
this machine, gradient checkpointing off. It compiles decoder layers, one graph for all lengths,
where UNSLOTH_CPU_COMPILE is 1 (UNSLOTH_COMPILE_DISABLE and its kin belong to GPUs), and trains
uncompiled where it finds no C++ compiler; that is an error here. After the training its loss on the
longest batch is held against that of plain PEFT with the same adapter: both are in the result as
`loss_check`.
"""

import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import measure
from benchmarks.arms import LORA_ALPHA, LORA_RANK, Arm
from benchmarks.token_rows import TokenRows

PACKAGES = ("unsloth", "unsloth_zoo", "torch", "transformers", "peft", "trl")
MAX_DIFFERENCE_NATS = 0.03  # a token, of two losses in bfloat16


def run(
    arm: Arm,
    model_folder: str,
    rows: TokenRows,
    n_rows: int,
    dtype: str,
    new_clock: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Train on about `n_rows` of the rows, weights in `dtype`; return what was measured.

    `new_clock` makes a TickCallback. It is called once Unsloth is there, which wants to be imported
    before transformers is.
    """
    os.environ["UNSLOTH_CPU_COMPILE"] = str(int(arm.compiled))  # read when adapters are added
    import torch
    import unsloth  # before transformers and TRL, which it changes

    from benchmarks import trainer_steps

    watch = measure.Stopwatch()
    with watch("load_model"):
        model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
            model_folder,
            max_seq_length=max(rows.lengths),
            dtype=getattr(torch, dtype),
            load_in_4bit=False,
            use_gradient_checkpointing=False,
        )
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            lora_dropout=0.0,
            target_modules=trainer_steps.TARGETS,
            layers_to_transform=list(arm.layers) if arm.layers else None,
            use_gradient_checkpointing=False,
        )
    is_compiled = getattr(model.get_base_model(), "_unsloth_cpu_compiled", False)
    if is_compiled != arm.compiled:
        raise SystemExit("Unsloth could not compile: it found no C++ compiler that works")
    picked = trainer_steps.picked_rows(arm, rows.lengths, n_rows)
    items = rows.items()
    chosen = [items[i] for i in picked]
    with tempfile.TemporaryDirectory(prefix="swlora-bench-") as scratch:
        with watch("trainer"):
            trainer = trainer_steps.sft_trainer(arm, model, tokenizer, chosen, scratch)
        clock = (new_clock or trainer_steps.TickCallback)()
        result = trainer_steps.train(arm, trainer, clock, rows.lengths, picked)
        batch = trainer_steps.PadRight(tokenizer.pad_token_id)(chosen[: arm.batch])
        check = _losses(arm, trainer, model_folder, batch)
    return {
        **result,
        "one_off_s": {**watch.seconds, **result["one_off_s"]},
        "per_row_s": {},
        "loss_check": check,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _losses(arm: Arm, trainer: Any, model_folder: str, batch: dict[str, Any]) -> dict[str, float]:
    """Return the loss of one batch from Unsloth and from plain PEFT with the same adapter."""
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from benchmarks import trainer_steps

    model, dtype = trainer.model, trainer.model.dtype
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    plain = trainer_steps.with_adapters(base, arm)
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with torch.no_grad():
            expected = float(plain(**batch).loss)
        # With gradients: without them Unsloth leaves its own loss for that of transformers.
        found = float(trainer.compute_loss(model, dict(batch)).detach())
    if abs(found - expected) > MAX_DIFFERENCE_NATS:
        raise SystemExit(f"Unsloth's loss is {found:.4f} and plain PEFT's {expected:.4f}")
    return {"unsloth": found, "peft": expected}
