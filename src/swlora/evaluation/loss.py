"""Teacher-forced loss of a data set: how surprised the model is by each reference token."""

from typing import Any

import torch

from swlora.data.tree_rows import TokenSequences, build_row, plan_steps
from swlora.engine.attention import TreeLayout
from swlora.engine.plain import completion_loss, pad
from swlora.engine.split_model import SplitModel
from swlora.engine.tree_step import fast_modules, row_loss
from swlora.loss_sum import LossSum
from swlora.progress import Progress

SEQUENCES_AT_ONCE = 64


@torch.inference_mode()
def dataset_loss(model: Any, sequences: TokenSequences, progress: Progress) -> LossSum:
    """Return the summed loss over the completion tokens of all sequences.

    `model` is a causal language model or a PeftModel around one; tree rows are used where the
    family can run them.
    """
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    split = SplitModel(base_model, 0)
    rows = plan_steps(
        sequences,
        sequences_per_step=SEQUENCES_AT_ONCE,
        max_tokens_per_row=4096,
        order="neighbours",
        seed=0,
        epoch=0,
    )
    total = LossSum()
    with progress.task("loss", len(sequences)) as task, fast_modules(model):
        for ids in (ids for step in rows for ids in step):
            if split.anatomy.family.has_attention_interface:
                row = build_row(sequences, ids)
                loss = row_loss(split, row, split.whole(TreeLayout(row, base_model.device)))
                total += LossSum(float(loss), row.n_target_tokens)
            else:
                padded_loss, n_tokens = completion_loss(model, pad(sequences, ids, model.device))
                total += LossSum(float(padded_loss), n_tokens)
            task.advance(len(ids))
    return total
