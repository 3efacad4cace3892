"""Losses and texts of which each of several processes makes a share; with one, it makes all."""

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from swlora.data.dealing import deal, deal_by_size
from swlora.data.token_sequences import Ints, TokenSequences
from swlora.evaluation.loss import grouped_losses
from swlora.loss_sum import LossSum
from swlora.models.sharded_weight import has_sharded
from swlora.processes import from_main, gathered, team
from swlora.progress import Progress


def dealt_losses(
    model: Any, sequences: TokenSequences, group_of: Ints, progress: Progress
) -> list[LossSum]:
    """Return what `grouped_losses` does, in all processes the same bits.

    The sequences are dealt by the nodes of their trees, and the sums of each group added up. Where
    the processes share the model's weights, each measures all, and the first one's losses count.
    """
    us = team()
    if not us.is_shared:
        return grouped_losses(model, sequences, group_of, progress)
    if has_sharded(model):  # its weights are gathered from all, who must run the same trees
        losses = grouped_losses(model, sequences, group_of, progress)
        return [LossSum(*loss) for loss in from_main(lambda: [astuple(own) for own in losses])]
    everything = [np.arange(len(sequences), dtype=np.int64)]
    share = deal(sequences, everything, us.size, lambda ids: [ids])[us.rank]
    own: dict[int, LossSum] = {}
    if share.groups:
        (ids,) = share.groups
        groups, numbers = np.unique(group_of[ids], return_inverse=True)
        losses = grouped_losses(model, sequences.subset(ids), numbers, progress)
        own = dict(zip(groups.tolist(), losses, strict=True))
    totals = [LossSum()] * (int(group_of.max()) + 1)
    for theirs in gathered([[i, loss.sum_nats, loss.n_tokens] for i, loss in own.items()]):
        for i, sum_nats, n_tokens in theirs:
            totals[i] += LossSum(sum_nats, n_tokens)
    return totals


def dealt_texts(sizes: Sequence[int], generate: Callable[[Sequence[int]], list[str]]) -> list[str]:
    """Return the texts for all prompts, in all processes; `sizes` is the work that each one makes.

    `generate` takes the numbers of prompts, and returns a list with their texts in these places.
    """
    us = team()
    share_of = deal_by_size(sizes, us.size)
    own: list[int] = np.flatnonzero(share_of == us.rank).tolist()
    texts = generate(own)
    for theirs in gathered([[i, texts[i]] for i in own]):
        for i, text in theirs:
            texts[i] = text
    return texts
