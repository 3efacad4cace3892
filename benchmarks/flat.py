"""Our own engine with nothing shared: every sequence is a trie of its own.

The same steps run as they do with prefix trees, so what the trees gain is the ratio of the rates.
"""

from collections.abc import Sequence

import numpy as np

from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.token_sequences import Ints, TokenSequences


def tree(sequences: TokenSequences, ids: Ints) -> PrefixTree:
    """Lay out the sequences `ids` side by side, each a trie of its own."""
    alone = [build_tree(sequences, np.array([i])) for i in ids]
    sizes = [len(one.token_ids) for one in alone]
    starts = np.cumsum([0, *sizes[:-1]])
    moved = list(zip(alone, starts, strict=True))
    return PrefixTree(
        token_ids=np.concatenate([one.token_ids for one in alone]),
        position_ids=np.concatenate([one.position_ids for one in alone]),
        subtree_end=np.concatenate([one.subtree_end + s for one, s in moved]).astype(np.int32),
        target_position=np.concatenate([one.target_position + s for one, s in moved]),
        target_id=np.concatenate([one.target_id for one in alone]),
        target_weight=np.concatenate([one.target_weight for one in alone]),
        sequence_ids=np.concatenate([one.sequence_ids for one in alone]),
        node_source=np.concatenate([one.node_source for one in alone]),
        shortest_tokens=min(one.shortest_tokens for one in alone),
        longest_tokens=max(one.longest_tokens for one in alone),
    )


def steps(
    sequences: TokenSequences, planned: Sequence[Sequence[Ints]], max_tokens_per_tree: int
) -> list[list[Ints]]:
    """Cut the sequences of every planned step into groups that fit a tree where none is shared."""
    return [_groups(sequences, np.concatenate(list(step)), max_tokens_per_tree) for step in planned]


def _groups(sequences: TokenSequences, ids: Ints, budget: int) -> list[Ints]:
    groups: list[list[int]] = [[]]
    used = 0
    for i in ids.tolist():
        n_nodes = sequences.length(i) - 1
        if groups[-1] and used + n_nodes > budget:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += n_nodes
    return [np.array(group, dtype=np.int64) for group in groups]
