"""Prefix trees: token sequences that share a beginning, every shared prefix computed once.

The context of a sequence is all of it but the last token, whose hidden state nothing reads. A tree
is the trie of its sequences' contexts, laid out depth first, so that

    query i may see key j   iff   j <= i < subtree_end[j],      position_ids[i] = depth of node i
    loss = sum_k target_weight[k] * -log p(target_id[k] | node target_position[k])

which equals the summed loss of the separate sequences: the weight of a target is the sum of the
weights of the tokens that it stands for, one of every sequence that trains it through that node.
Contexts without a common first token are separate tries of one tree. With contexts sorted, the new
nodes of each are those beyond its common prefix with the one before, and already stand in
depth-first order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swlora.data.token_sequences import (
    PAD,
    Ints,
    TokenSequences,
    argsort_rows,
    common_with_previous,
    gather,
)
from swlora.loss_sum import as_count


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """One trie, or several side by side: T nodes depth first and K weighted targets.

    token_ids, position_ids, subtree_end: (T,) int32. target_position (node whose logits are
    scored) and target_id: (K,) int64, sorted, each pair once; target_weight: (K,) float32, the sum
    over the sequences that train it. sequence_ids: int64, the sequences held, in layout order.
    node_source: (T,) int64, where in `TokenSequences.tokens` each node was first read.
    shortest_tokens, longest_tokens: of its sequences, the last token counted.
    """

    token_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    subtree_end: NDArray[np.int32]
    target_position: NDArray[np.int64]
    target_id: NDArray[np.int64]
    target_weight: NDArray[np.float32]
    sequence_ids: NDArray[np.int64]
    node_source: NDArray[np.int64]
    shortest_tokens: int
    longest_tokens: int

    @property
    def n_sequences(self) -> int:
        """Sequences in this tree."""
        return len(self.sequence_ids)

    @property
    def n_target_tokens(self) -> float:
        """Trained tokens of all its sequences: the sum of the weights, an int where it is whole."""
        return as_count(self.target_weight.sum(dtype=np.float64))


def build_tree(sequences: TokenSequences, ids: Ints) -> PrefixTree:
    """Lay out the sequences `ids` as one tree; an id given twice weighs twice.

    Raises ValueError for no ids or ids out of range, DataError for a negative token id.
    """
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size == 0 or ids.min() < 0 or ids.max() >= len(sequences):
        raise ValueError(f"ids must be one or more of 0..{len(sequences) - 1}")
    tokens = gather(sequences, ids, 0, int(sequences.lengths[ids].max()), sequences.lengths)
    depth = np.arange(tokens.shape[1] - 1)
    contexts = np.where(depth < sequences.lengths[ids, None] - 1, tokens[:, :-1], PAD)
    order = argsort_rows(contexts)
    ids, tokens, contexts = ids[order], tokens[order], contexts[order]

    inside = contexts != PAD
    new = inside.copy()
    new[1:] &= ~np.logical_and.accumulate(contexts[1:] == contexts[:-1], axis=1)
    node = np.full(contexts.shape, -1, dtype=np.int64)
    node[new] = np.arange(np.count_nonzero(new))
    # Down a column the node of a shared prefix is the latest one created there.
    node = np.maximum.accumulate(node, axis=0)
    # A node's subtree ends with the nodes of the last context that passes through it.
    nodes_so_far = np.cumsum(np.count_nonzero(new, axis=1))
    subtree_end = np.zeros(nodes_so_far[-1], dtype=np.int32)
    np.maximum.at(subtree_end, node[inside], np.repeat(nodes_so_far, inside.sum(axis=1)))

    place = np.where(inside, sequences.offsets[ids, None] + depth + 1, 0)
    weight = np.where(inside, np.asarray(sequences.weights)[place], 0)
    trained = weight > 0
    pair = (node[trained] << 32) | tokens[:, 1:][trained]
    pair, pair_of = np.unique(pair, return_inverse=True)
    creator, position = np.nonzero(new)
    return PrefixTree(
        token_ids=contexts[new],
        position_ids=position.astype(np.int32),
        node_source=sequences.offsets[ids[creator]] + position,
        subtree_end=subtree_end,
        target_position=pair >> 32,
        target_id=pair & 0xFFFFFFFF,
        target_weight=np.bincount(pair_of, weights=weight[trained]).astype(np.float32),
        sequence_ids=ids,
        shortest_tokens=int(sequences.lengths[ids].min()),
        longest_tokens=int(sequences.lengths[ids].max()),
    )


def count_nodes(sequences: TokenSequences) -> int:
    """Count the nodes of the one trie over all sequences."""
    _, common = sequences.sorted_contexts
    return int((sequences.lengths - 1).sum() - common.sum())


def count_group_nodes(sequences: TokenSequences, groups: Sequence[Ints]) -> Ints:
    """Count the nodes of the tree of each group, (n,), without building any."""
    sizes = np.array([len(ids) for ids in groups])
    ids, group = np.concatenate(groups), np.repeat(np.arange(len(groups)), sizes)
    ids = ids[np.lexsort((sequences.ranks[1][ids], group))]
    starts = np.cumsum(sizes) - sizes
    common = common_with_previous(sequences, ids)
    common[starts] = 0
    return np.add.reduceat(sequences.lengths[ids] - 1 - common, starts)


def number_nodes(sequences: TokenSequences) -> Ints:
    """Number the nodes of the one trie over all sequences.

    Returns the number of the node at every token, (total,) int64, from 0 without gaps; -1 for the
    last token of a sequence, which is never a context. Tokens share a number exactly where they
    share everything up to themselves.
    """
    order, common = sequences.sorted_contexts
    numbers = np.full(len(sequences.tokens), -1, dtype=np.int64)
    n_nodes = previous = 0
    for i, shared in zip(order.tolist(), common.tolist(), strict=True):
        start, end = int(sequences.offsets[i]), int(sequences.offsets[i + 1]) - 1
        numbers[start : start + shared] = numbers[previous : previous + shared]
        n_new = end - start - shared
        numbers[start + shared : end] = np.arange(n_nodes, n_nodes + n_new)
        n_nodes, previous = n_nodes + n_new, start
    return numbers
