"""The plain training step: a padded batch, the transformers forward, cross-entropy.

    L = sum over completion tokens of -log p(token | everything before it)

Sequences whose rotary frequencies differ by their length have batches of their own.

Deliberately the obvious way. It is the oracle that every faster step must equal.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from swlora.data.token_sequences import TokenSequences
from swlora.kernels.rotary import RotaryLengths
from swlora.loss_sum import LossSum

IGNORED = -100


class PaddedBatch(NamedTuple):
    """Right-padded sequences: ids, mask and labels of shape (B, T); labels -100 are not scored."""

    token_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class PlainStep:
    """Loss and gradient of the rows of one optimizer step, the plain way."""

    def __init__(
        self, model: Any, sequences: TokenSequences, *, label_smoothing: float = 0.0
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.label_smoothing = label_smoothing
        self._rotary = RotaryLengths(model)

    def __call__(self, rows: Sequence[np.ndarray]) -> LossSum:
        """Add the gradient of the summed loss of the step; return that loss."""
        total = LossSum()
        for ids in self._rotary.sides(np.concatenate(list(rows)), self.sequences.lengths):
            batch = pad(self.sequences, ids, self.model.device)
            loss, n_tokens = completion_loss(self.model, batch, self.label_smoothing)
            torch.autograd.backward(loss)
            total += LossSum(float(loss.detach()), n_tokens)
        return total

    def close(self) -> None:
        """Hold nothing, so let go of nothing."""


def pad(sequences: TokenSequences, ids: np.ndarray, device: Any) -> PaddedBatch:
    """Right-pad the sequences `ids` to the longest of them; labels cover completions only."""
    lengths = [sequences.length(int(i)) for i in ids]
    shape = (len(ids), max(lengths))
    token_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for b, (i, length) in enumerate(zip(ids, lengths, strict=True)):
        start = int(sequences.offsets[i])
        tokens = torch.from_numpy(sequences.tokens[start : start + length].astype(np.int64))
        token_ids[b, :length] = tokens
        attention_mask[b, :length] = 1
        prompt_length = int(sequences.prompt_lengths[i])
        labels[b, prompt_length:length] = tokens[prompt_length:]
    return PaddedBatch(token_ids.to(device), attention_mask.to(device), labels.to(device))


def completion_loss(
    model: Any, batch: PaddedBatch, label_smoothing: float = 0.0
) -> tuple[Tensor, int]:
    """Return (summed loss in nats, number of scored tokens); reductions in float32."""
    logits = model(
        input_ids=batch.token_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits[:, :-1]
    targets = batch.labels[:, 1:]
    loss = F.cross_entropy(
        (logits if logits.dtype == torch.float64 else logits.float()).flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return loss, int((targets != IGNORED).sum())
