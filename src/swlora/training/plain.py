"""The plain training step: a padded batch, the transformers forward, cross-entropy.

    L = sum over trained tokens of weight * -log p(token | everything before it)

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
from swlora.loss_sum import LossSum, as_count
from swlora.training.necessary_work import Work

IGNORED = -100


class PaddedBatch(NamedTuple):
    """Right-padded sequences: ids, mask, labels and their weights (float32), of shape (B, T).

    Labels of -100 are not scored; their weight is 0.
    """

    token_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    weights: Tensor


class PlainStep:
    """Loss and gradient of the sequences of one optimizer step, the plain way."""

    def __init__(
        self, model: Any, sequences: TokenSequences, *, label_smoothing: float = 0.0
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.label_smoothing = label_smoothing
        self._rotary = RotaryLengths(model)
        self.work = Work(flops=None)

    def __call__(self, groups: Sequence[np.ndarray]) -> LossSum:
        """Add the gradient of the summed loss of the step; return that loss."""
        total = LossSum()
        for ids in self._batches(groups):
            batch = pad(self.sequences, ids, self.model.device)
            loss, n_tokens = weighted_loss(self.model, batch, self.label_smoothing)
            torch.autograd.backward(loss)
            self.work.n_nodes += batch.token_ids.numel()  # padding too: it is run
            self.work.n_tokens += int(batch.attention_mask.sum())
            total += LossSum(float(loss.detach()), n_tokens)
        return total

    def padded_tokens(self, groups: Sequence[np.ndarray]) -> int:
        """Return the tokens that a step runs, padding included."""
        lengths = (self.sequences.lengths[ids] for ids in self._batches(groups))
        return sum(int(own.max()) * len(own) for own in lengths)

    def _batches(self, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(self._rotary.sides(np.concatenate(list(groups)), self.sequences.lengths))

    def close(self) -> None:
        """Do nothing: only a tree step holds files that must be closed."""


def pad(sequences: TokenSequences, ids: np.ndarray, device: Any) -> PaddedBatch:
    """Right-pad the sequences `ids` to the longest of them; labels cover trained tokens only."""
    lengths = [sequences.length(int(i)) for i in ids]
    shape = (len(ids), max(lengths))
    token_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    weights = torch.zeros(shape)
    for b, (i, length) in enumerate(zip(ids, lengths, strict=True)):
        part = slice(int(sequences.offsets[i]), int(sequences.offsets[i]) + length)
        token_ids[b, :length] = torch.from_numpy(sequences.tokens[part].astype(np.int64))
        attention_mask[b, :length] = 1
        weights[b, :length] = torch.from_numpy(sequences.weights[part].astype(np.float32))
    labels = token_ids.masked_fill(weights == 0, IGNORED)
    return PaddedBatch(*(x.to(device) for x in (token_ids, attention_mask, labels, weights)))


def weighted_loss(
    model: Any, batch: PaddedBatch, label_smoothing: float = 0.0
) -> tuple[Tensor, float]:
    """Return (summed loss in nats, sum of the weights); reductions in float32."""
    logits = model(
        input_ids=batch.token_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits[:, :-1]
    losses = F.cross_entropy(
        (logits if logits.dtype == torch.float64 else logits.float()).flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum(), as_count(float(weights.sum(dtype=torch.float64)))
