"""The sequences of a step, dealt to several processes: so that all are done at the same time.

    what a process runs = the nodes of the trees of its sequences        to make small: the largest

Two ways of dealing are tried, and the one with the smaller largest share is taken: neighbours
together, which computes fewest prefixes twice, and prompts by their size, which is closer to equal
shares where there are few sequences, or long ones. The result depends on nothing but the step, so
that every process knows the shares of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import ArrayLike

from swlora.data.prefix_tree import count_group_nodes
from swlora.data.token_sequences import Ints, TokenSequences, common_with_previous

Cut = Callable[[Ints], list[Ints]]


@dataclass(frozen=True)
class Share:
    """What one process runs of a step: `groups`, the sequence ids of a tree each, and `n_nodes`.

    All shares of a step have the same number of trees; `n_empty` is how many this one lacks, since
    its sequences cannot be divided further.
    """

    groups: list[Ints]
    n_nodes: int
    n_empty: int


def deal(sequences: TokenSequences, groups: Sequence[Ints], n_shares: int, cut: Cut) -> list[Share]:
    """Deal the sequences of a step to `n_shares`, each sequence to one of them.

    `cut` divides sequences into groups that fit a tree, as every share is cut. Where a step has
    fewer sequences than there are shares, some are empty.
    """
    ids = np.concatenate(list(groups))
    prompt, context = sequences.ranks
    ids = ids[np.lexsort((context[ids], prompt[ids]))]
    nodes = sequences.lengths[ids] - 1  # of a sequence by itself
    added = nodes - common_with_previous(sequences, ids)
    ways = [
        _in_order(nodes, added, n_shares),
        _by_prompt(np.unique(prompt[ids], return_inverse=True)[1], added, n_shares),
    ]
    dealt = [[ids[share == k] for k in range(n_shares)] for share in ways]
    best = min(dealt, key=lambda shares: max(_n_nodes(sequences, own) for own in shares))
    cuts = [cut(own) if len(own) else [] for own in best]
    n_trees = max(map(len, cuts))
    cuts = [_in_parts(sequences, own, n_trees) for own in cuts]
    return [
        Share(own, sum(_n_nodes(sequences, ids) for ids in own), n_trees - len(own)) for own in cuts
    ]


def _n_nodes(sequences: TokenSequences, ids: Ints) -> int:
    return int(count_group_nodes(sequences, [ids])[0]) if len(ids) else 0


def _in_order(nodes: Ints, added: Ints, n_shares: int) -> Ints:
    """Return the share of every sequence, (n,), neighbours together, with the smallest largest."""
    total = np.concatenate([[0], np.cumsum(added)])

    def ends(most: int) -> list[int]:
        found, start = [0], 0
        while start < len(nodes) and len(found) <= n_shares:
            room = most - nodes[start] + total[start + 1]
            start = int(np.searchsorted(total, room, side="right")) - 1
            found.append(start)
        return found

    low, high = int(nodes.max()), int(nodes[0] + total[-1])
    while low < high:  # the least that all sequences fit into
        middle = (low + high) // 2
        if ends(middle)[-1] >= len(nodes):
            high = middle
        else:
            low = middle + 1
    return np.searchsorted(np.array(ends(low)), np.arange(len(nodes)), side="right") - 1


def _by_prompt(prompt: Ints, added: Ints, n_shares: int) -> Ints:
    """Return the share of every sequence, (n,), those of a prompt together."""
    return deal_by_size(np.bincount(prompt, weights=added), n_shares)[prompt]


def deal_by_size(sizes: ArrayLike, n_shares: int) -> Ints:
    """Return the share of every piece of work, (n,): the largest first, each to the smallest."""
    sizes = np.asarray(sizes, dtype=np.float64)
    filled = [(0.0, share) for share in range(n_shares)]
    heapify(filled)
    share_of = np.zeros(len(sizes), dtype=np.int64)
    for number in np.argsort(-sizes, kind="stable").tolist():
        held, share = filled[0]
        share_of[number] = share
        heapreplace(filled, (held + sizes[number], share))
    return share_of


def _in_parts(sequences: TokenSequences, groups: list[Ints], n: int) -> list[Ints]:
    """Divide groups, the largest first, until there are `n`, or only single sequences."""
    groups = list(groups)
    while len(groups) < n:
        sizes = [_n_nodes(sequences, ids) if len(ids) > 1 else 0 for ids in groups]
        if not any(sizes):
            break
        largest = int(np.argmax(sizes))
        groups[largest : largest + 1] = np.array_split(groups[largest], 2)
    return groups
