"""Teacher-forced loss: how surprised a model is by each reference token.

Losses come as sums by group of sequences, such as all references of one prompt, so that a bootstrap
can resample prompts. Every row of the data is still run once, in the trees of training: nodes
that groups share are shared, and each group is scored at its own targets.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from swlora.adapters.base_model import base_model_of
from swlora.adapters.reach import is_covered
from swlora.data.prefix_tree import PrefixTree, build_tree, number_nodes
from swlora.data.steps import plan_steps
from swlora.data.token_sequences import Ints, TokenSequences
from swlora.errors import RunFailedError
from swlora.kernels.forwards import fast_forwards
from swlora.kernels.patched_forwards import patched_forwards
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.loss_sum import LossSum
from swlora.memory import is_out_of_memory
from swlora.models.sharded_weight import has_sharded
from swlora.progress import Progress
from swlora.threads import adapted_threads
from swlora.training.plain import pad, weighted_loss
from swlora.training.step import tree_nats

R = TypeVar("R")
SEQUENCES_AT_ONCE = 64
PADDED_AT_ONCE = 8


def dataset_loss(model: Any, sequences: TokenSequences, progress: Progress) -> LossSum:
    """Return the summed loss over the trained tokens of all sequences."""
    one_group = np.zeros(len(sequences), dtype=np.int64)
    return grouped_losses(model, sequences, one_group, progress)[0]


@adapted_threads()
def grouped_losses(
    model: Any, sequences: TokenSequences, group_of: Ints, progress: Progress
) -> list[LossSum]:
    """Return the summed loss over the trained tokens of every group of sequences.

    group_of: (n,) int64, the group of each sequence; groups are numbered from 0 without gaps.
    `model` is a causal language model or a PeftModel around one; prefix trees are used where the
    family can run them and the adapter is one of the blocks' projections, else padded batches.
    Where memory runs out, fewer sequences are run at once. Raises ValueError where group_of does
    not fit, and RunFailedError where memory has no room for a single sequence.
    """
    if group_of.shape != (len(sequences),) or not np.bincount(group_of).all():
        raise ValueError("group_of must number the group of every sequence, from 0 without gaps")
    base_model = base_model_of(model)
    walk = TreeWalk(base_model, 0)
    n_groups = int(group_of.max()) + 1
    node_numbers = number_nodes(sequences) if n_groups > 1 else np.empty(0, dtype=np.int64)
    totals = [LossSum()] * n_groups
    is_fast = is_covered(model)
    has_trees = is_fast and walk.anatomy.family.has_attention_interface
    forwards = patched_forwards(fast_forwards(model)) if is_fast else nullcontext()
    no_graph = without_graph(base_model)

    def losses_of(ids: Ints) -> list[tuple[int, LossSum]]:
        if has_trees:
            return _tree_losses(walk, sequences, ids, group_of, node_numbers)
        own = ((group, ids[group_of[ids] == group]) for group in np.unique(group_of[ids]))
        return [(int(group), _padded_loss(model, sequences, of_group)) for group, of_group in own]

    with progress.task("loss", len(sequences)) as task, forwards, no_graph:
        trees = trees_at_once(sequences)
        together = (part for ids in trees for part in walk.rotary.sides(ids, sequences.lengths))
        for n_run, losses in _as_memory_allows(together, losses_of, has_sharded(base_model)):
            for group, loss in losses:
                totals[group] += loss
            task.advance(n_run)
    return totals


def _as_memory_allows(
    together: Iterable[Ints], run: Callable[[Ints], R], is_sharded: bool
) -> Iterator[tuple[int, R]]:
    """Yield (sequences, what `run` makes of them), in twice as many parts where memory runs out.

    Raises RunFailedError where that cannot help.
    """
    n_parts = 1  # of each of them, from where memory ran out on
    for ids in together:
        start = 0
        while start < len(ids):
            part = ids[start : start + math.ceil(len(ids) / n_parts)]
            try:
                found = run(part)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            else:
                start += len(part)
                yield len(part), found
                continue
            if is_sharded:  # other processes wait in the middle of the tree
                raise RunFailedError("memory ran out in an evaluation; start more processes")
            if len(part) == 1:
                raise RunFailedError(
                    "a single sequence does not fit into memory; --truncate it, or take another "
                    "--device"
                )
            n_parts *= 2


def _tree_losses(
    walk: TreeWalk, sequences: TokenSequences, ids: Ints, group_of: Ints, node_numbers: Ints
) -> list[tuple[int, LossSum]]:
    """Return the losses of sequences by their groups, from the tree of all."""
    tree = build_tree(sequences, ids)
    hidden = walk.whole(TreeLayout(tree, walk.base_model.device))
    return [
        (group, LossSum(float(tree_nats(walk, part, hidden)), part.n_target_tokens))
        for group, part in _split_targets(sequences, tree, group_of, node_numbers)
    ]


def trees_at_once(sequences: TokenSequences) -> list[Ints]:
    """Return the sequences that are run together, those of one tree each."""
    steps = plan_steps(
        sequences,
        sequences_per_step=SEQUENCES_AT_ONCE,
        max_tokens_per_tree=4096,
        order="neighbours",
        seed=0,
        epoch=0,
    )
    return [ids for step in steps for ids in step]


def without_graph(model: Any) -> AbstractContextManager[None]:
    """Return a context without gradients: inference mode, but for a model with sharded weights.

    They cannot be detached there (findings/dtensor_views_in_inference_mode.sh).
    """
    return torch.no_grad() if has_sharded(model) else torch.inference_mode()


def _padded_loss(model: Any, sequences: TokenSequences, ids: Ints) -> LossSum:
    """Return the loss of sequences in padded batches, whose logits take the memory."""
    total = LossSum()
    for start in range(0, len(ids), PADDED_AT_ONCE):
        batch = pad(sequences, ids[start : start + PADDED_AT_ONCE], model.device)
        loss, n_tokens = weighted_loss(model, batch)
        total += LossSum(float(loss), n_tokens)
    return total


def _split_targets(
    sequences: TokenSequences, tree: PrefixTree, group_of: Ints, node_numbers: Ints
) -> Iterator[tuple[int, PrefixTree]]:
    """Yield (group, the tree with that group's targets only) for every group in the tree.

    A group's targets are those of a tree of its own; its nodes are found in the tree by their
    numbers in the one trie over all sequences.
    """
    groups = group_of[tree.sequence_ids]
    present = np.unique(groups)
    if len(present) == 1:
        yield int(present[0]), tree
        return
    numbers = node_numbers[tree.node_source]
    order = np.argsort(numbers)
    for group in present:
        own = build_tree(sequences, tree.sequence_ids[groups == group])
        scored = node_numbers[own.node_source[own.target_position]]
        yield (
            int(group),
            replace(
                tree,
                target_position=order[np.searchsorted(numbers, scored, sorter=order)],
                target_id=own.target_id,
                target_weight=own.target_weight,
            ),
        )
