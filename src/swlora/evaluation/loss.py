"""Teacher-forced loss of a data set: how surprised the model is by each reference token."""

from typing import Any

import numpy as np
import torch

from swlora.data.tree_rows import TokenSequences
from swlora.engine.plain import completion_loss, pad
from swlora.loss_sum import LossSum
from swlora.progress import Progress


@torch.inference_mode()
def dataset_loss(
    model: Any, sequences: TokenSequences, batch_size: int, progress: Progress
) -> LossSum:
    """Return the summed loss over the completion tokens of all sequences."""
    lengths = np.diff(sequences.offsets)
    order = np.argsort(lengths, kind="stable")
    total = LossSum()
    with progress.task("dev loss", len(sequences)) as task:
        for start in range(0, len(order), batch_size):
            ids = order[start : start + batch_size]
            loss, n_tokens = completion_loss(model, pad(sequences, ids, model.device))
            total += LossSum(float(loss), n_tokens)
            task.advance(len(ids))
    return total
