"""A data set cut into groups that depend on nothing but its tokens, for states that are kept.

A state is rounded as the whole tree was that computed it: products sum in an order that depends on
the number of rows, attention in one that depends on the chunk. So what is kept for other steps and
runs is computed in these groups, whichever of their sequences a step needs.
"""

from dataclasses import dataclass

import numpy as np

from swlora.data.token_sequences import Ints, TokenSequences

GROUP_NODES = 1024  # products of fewer rows are slower; more, and a first step computes too much
MAX_TREE_NODES = 4096  # of a group, where a single sequence is no longer; bounds memory
MAX_REPEATED_SHARE = 1 / 16  # of a group's own nodes, computed before in another group


@dataclass(frozen=True)
class FixedGroups:
    """Neighbours in the order of contexts in G groups; each owns the nodes that no earlier one has.

    order: (n,) sequence ids; first_sequence: (G + 1,) places in `order` where groups begin;
    first_node: (G + 1,) the first node of each, numbered as by `number_nodes`; n_shared: (G,) nodes
    of a group's tree that earlier groups own, the first ones of the tree.
    """

    order: Ints
    first_sequence: Ints
    first_node: Ints
    n_shared: Ints

    def sequence_ids(self, group: int) -> Ints:
        """Return the sequences of a group, those of one `build_tree`."""
        return self.order[self.first_sequence[group] : self.first_sequence[group + 1]]

    def owners(self, nodes: Ints) -> Ints:
        """Return the groups that own any of the nodes, each once, ascending."""
        return np.unique(np.searchsorted(self.first_node, nodes, side="right") - 1)


def fixed_groups(sequences: TokenSequences) -> FixedGroups:
    """Cut all sequences into groups of about `GROUP_NODES` own nodes, where little is repeated."""
    order, common = sequences.sorted_contexts
    added = sequences.lengths[order] - 1 - common
    starts = [0]
    own, tree = 0, 0
    for place, (shared, new) in enumerate(zip(common.tolist(), added.tolist(), strict=True)):
        cheap = own >= GROUP_NODES and shared <= own * MAX_REPEATED_SHARE
        if new and own and (cheap or tree + new > MAX_TREE_NODES):
            starts.append(place)
            own, tree = 0, shared
        own, tree = own + new, tree + new
    first = np.array(starts, dtype=np.int64)
    nodes = np.concatenate([[0], np.cumsum(added)])
    ends = np.append(first, len(order))
    return FixedGroups(order, ends, nodes[ends], common[first])
