"""Tree rows: the token sequences of a step as prefix tries, every shared prefix computed once.

A sequence is a prompt and a completion; its context is all of it but the last token, whose hidden
state nothing reads. A row is the trie of its sequences' contexts, laid out depth first, so that

    query i may see key j   iff   j <= i < subtree_end[j],      position_ids[i] = depth of node i
    loss = sum_k target_weight[k] * -log p(target_id[k] | node target_position[k])

which equals the summed completion loss of the separate sequences: the weight of a target is the
number of sequences that train that token through that node. Contexts without a common first token
are separate trees of one row. With contexts sorted, the new nodes of each are those beyond its
common prefix with the one before, and already stand in depth-first order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from swlora.errors import DataError

Ints = NDArray[np.int64]
StepOrder = Literal["neighbours", "prompts", "iid"]

_PAD = -1
_CHUNK_TOKENS = 16  # columns compared at a time: bounds memory to n * 16 tokens, not n * longest


@dataclass(frozen=True, eq=False)
class TokenSequences:
    """A tokenised data set: sequence i is `tokens[offsets[i]:offsets[i + 1]]`, prompt first.

    tokens (total,) int32, in memory or a np.memmap, never copied whole; offsets (n + 1,) int64;
    prompt_lengths (n,) int32. Raises DataError naming the first sequence without a prompt token or
    without a completion token, ValueError where the arrays do not fit together.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]

    def __post_init__(self) -> None:
        for name, dtype in (
            ("tokens", np.int32),
            ("offsets", np.int64),
            ("prompt_lengths", np.int32),
        ):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                raise ValueError(f"{name} must be one-dimensional {np.dtype(dtype)}")
        if len(self.offsets) != len(self.prompt_lengths) + 1:
            raise ValueError("offsets must have one entry more than prompt_lengths")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise ValueError("offsets must run from 0 to the number of tokens")
        if len(self) == 0:
            raise DataError("the data set holds no sequences")
        for bad, what in (
            (self.prompt_lengths < 1, "prompt"),
            (self.prompt_lengths >= self.lengths, "completion"),
        ):
            if bad.any():
                raise DataError(f"sequence {int(bad.argmax())} has no {what} token")

    @classmethod
    def from_lists(cls, pairs: Sequence[tuple[list[int], list[int]]]) -> "TokenSequences":
        """Build from (prompt ids, completion ids) pairs; the completions already end in EOS."""
        for i, (prompt, completion) in enumerate(pairs):
            if not prompt or not completion:
                raise DataError(f"sequence {i} has no {'completion' if prompt else 'prompt'} token")
        lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
        flat = chain.from_iterable(chain.from_iterable(pairs))
        return cls(
            np.fromiter(flat, dtype=np.int32, count=sum(lengths)),
            np.cumsum([0, *lengths], dtype=np.int64),
            np.array([len(prompt) for prompt, _ in pairs], dtype=np.int32),
        )

    @classmethod
    def joined(cls, parts: Sequence["TokenSequences"]) -> "TokenSequences":
        """Return the sequences of all parts, in their order."""
        lengths = np.concatenate([[0], *(part.lengths for part in parts)])
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.cumsum(lengths, dtype=np.int64),
            np.concatenate([part.prompt_lengths for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def length(self, i: int) -> int:
        """Return the tokens of sequence i, prompt and completion."""
        return int(self.offsets[i + 1] - self.offsets[i])

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of every sequence, (n,) int64."""
        return np.diff(self.offsets)

    @cached_property
    def _ranks(self) -> tuple[Ints, Ints]:
        """Lexicographic dense ranks of the prompts and of the contexts, (n,) each."""
        return _prefix_ranks(self, self.prompt_lengths), _prefix_ranks(self, self.lengths - 1)


@dataclass(frozen=True, eq=False)
class TreeRow:
    """One trie, or several side by side: T nodes depth first and K weighted targets.

    token_ids, position_ids, subtree_end: (T,) int32. target_position (node whose logits are
    scored) and target_id: (K,) int64, sorted, each pair once; target_weight: (K,) float32, the
    sequences that train it. sequence_ids: int64, the data-set rows held, in layout order.
    node_source: (T,) int64, where in `TokenSequences.tokens` each node was first read.
    """

    token_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    subtree_end: NDArray[np.int32]
    target_position: NDArray[np.int64]
    target_id: NDArray[np.int64]
    target_weight: NDArray[np.float32]
    sequence_ids: NDArray[np.int64]
    node_source: NDArray[np.int64]

    @property
    def n_sequences(self) -> int:
        """Rows of the data set in this tree row."""
        return len(self.sequence_ids)

    @property
    def n_target_tokens(self) -> int:
        """Completion tokens of all its sequences: the sum of the weights."""
        return int(self.target_weight.sum(dtype=np.float64))


def build_row(sequences: TokenSequences, ids: Ints) -> TreeRow:
    """Lay out the sequences `ids` as one tree row; an id given twice weighs twice.

    Raises ValueError for no ids or ids out of range, DataError for a negative token id.
    """
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size == 0 or ids.min() < 0 or ids.max() >= len(sequences):
        raise ValueError(f"ids must be one or more of 0..{len(sequences) - 1}")
    tokens = _gather(sequences, ids, 0, int(sequences.lengths[ids].max()), sequences.lengths)
    depth = np.arange(tokens.shape[1] - 1)
    contexts = np.where(depth < sequences.lengths[ids, None] - 1, tokens[:, :-1], _PAD)
    order = _argsort_rows(contexts)
    ids, tokens, contexts = ids[order], tokens[order], contexts[order]

    inside = contexts != _PAD
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

    trained = inside & (depth >= sequences.prompt_lengths[ids, None] - 1)
    pair = (node[trained] << 32) | tokens[:, 1:][trained]
    pair, count = np.unique(pair, return_counts=True)
    creator, position = np.nonzero(new)
    return TreeRow(
        token_ids=contexts[new],
        position_ids=position.astype(np.int32),
        node_source=sequences.offsets[ids[creator]] + position,
        subtree_end=subtree_end,
        target_position=pair >> 32,
        target_id=pair & 0xFFFFFFFF,
        target_weight=count.astype(np.float32),
        sequence_ids=ids,
    )


def plan_steps(
    sequences: TokenSequences,
    *,
    sequences_per_step: int,
    max_tokens_per_row: int,
    order: StepOrder,
    seed: int,
    epoch: int,
) -> list[list[Ints]]:
    """Plan one epoch: optimizer steps, each a list of rows, each row the ids for `build_row`.

    Every sequence comes exactly once; the same (seed, epoch) gives the same plan. An epoch always
    has ceil(n / sequences_per_step) steps, all within one unit of their mean, n / steps:
    - "iid": single sequences, shuffled;
    - "prompts": the sequences of one identical prompt stay together, the prompts are shuffled;
    - "neighbours": so do lexicographically neighbouring prompts; where a step begins differs from
      epoch to epoch, and the steps are shuffled.
    Prompts with more sequences than a step holds are split. A step is cut into as few rows as
    a greedy pass finds with at most `max_tokens_per_row` nodes each; a sequence longer than that
    has a row of its own, and a prompt is divided between rows only where it does not fit one.
    """
    if sequences_per_step < 1 or max_tokens_per_row < 1:
        raise ValueError("sequences_per_step and max_tokens_per_row must be at least 1")
    rng = np.random.default_rng([seed, epoch])
    n_steps = -(-len(sequences) // sequences_per_step)
    if order == "iid":
        unit = rng.permutation(len(sequences))
    elif order == "prompts" or order == "neighbours":
        unit = _prompt_units(sequences, len(sequences) // n_steps, order, rng)
    else:
        raise ValueError(f"unknown order {order!r}: use neighbours, prompts or iid")
    # A unit goes to the step in whose equal share of the epoch its middle lies, which keeps sizes
    # closest to the mean. Units are no larger than a share, so no step stays empty.
    sizes = np.bincount(unit)
    step_of_unit = (2 * np.cumsum(sizes) - sizes) * n_steps // (2 * len(sequences))
    step = rng.permutation(n_steps)[step_of_unit[unit]]
    prompt, context = sequences._ranks
    ids = np.lexsort((context, prompt, step))
    return _cut_rows(sequences, ids, step[ids], max_tokens_per_row)


def _prompt_units(
    sequences: TokenSequences, largest: int, order: StepOrder, rng: np.random.Generator
) -> Ints:
    """Number the units that stay in one step, (n,): a prompt's sequences, or `largest` of them.

    Larger prompts are divided at another place every time: among neighbouring completions for
    "neighbours", at random for "prompts".
    """
    prompt, context = sequences._ranks
    within = context if order == "neighbours" else rng.permutation(len(sequences))
    ids = np.lexsort((within, prompt))
    sizes = np.bincount(prompt)
    position = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shift = np.repeat(np.where(sizes > largest, rng.integers(largest), 0), sizes)
    piece = (position + shift) // largest
    unit_sorted = np.cumsum(_starts(prompt[ids], piece)) - 1
    n_units = int(unit_sorted[-1]) + 1
    if order == "neighbours":
        turn = (np.arange(n_units) + rng.integers(n_units)) % n_units
    else:
        turn = rng.permutation(n_units)
    unit = np.empty_like(unit_sorted)
    unit[ids] = turn[unit_sorted]
    return unit


def _cut_rows(sequences: TokenSequences, ids: Ints, step: Ints, budget: int) -> list[list[Ints]]:
    """Cut ids, sorted by step and within it by prompt and context, into the rows of every step.

    Counts nodes from common prefixes of neighbours: exact, but for prompts that begin with another
    prompt of the row, where it may count some twice; so a row never exceeds the budget.
    """
    context = (sequences.lengths - 1)[ids]
    added = context - _common_with_previous(sequences, ids)
    total = np.concatenate([[0], np.cumsum(added)])
    prompt = sequences._ranks[0][ids]
    groups = np.append(np.flatnonzero(_starts(step, prompt)), len(ids))
    # One group, where it fits a row whole, else its sequences one by one.
    whole = context[groups[:-1]] + total[groups[1:]] - total[groups[:-1] + 1] <= budget
    splits = [np.arange(a, b) for a, b in zip(groups[:-1][~whole], groups[1:][~whole], strict=True)]
    parts = np.unique(np.concatenate([groups, *splits]))
    alone = context[parts[:-1]] + total[parts[1:]] - total[parts[:-1] + 1]
    joined = total[parts[1:]] - total[parts[:-1]]

    new_step = _starts(step)[parts[:-1]]
    cuts, used = [], 0
    columns = (parts[:-1], new_step, alone, joined)
    for start, first, nodes_alone, nodes_joined in zip(*(c.tolist() for c in columns), strict=True):
        if first or used + nodes_joined > budget:
            cuts.append(start)
            used = nodes_alone
        else:
            used += nodes_joined
    steps: list[list[Ints]] = []
    for start, row in zip(cuts, np.split(ids, cuts[1:]), strict=True):
        if start == 0 or step[start] != step[start - 1]:
            steps.append([])
        steps[-1].append(row)
    return steps


def number_nodes(sequences: TokenSequences) -> tuple[Ints, int]:
    """Number the nodes of the one trie over all sequences.

    Returns (number of the node at every token, (total,) int64, -1 for the last token of a
    sequence, which is never a context; how many nodes there are). Tokens share a number exactly
    where they share everything up to themselves.
    """
    order = np.argsort(sequences._ranks[1], kind="stable")
    common = _common_with_previous(sequences, order)
    numbers = np.full(len(sequences.tokens), -1, dtype=np.int64)
    n_nodes = previous = 0
    for i, shared in zip(order.tolist(), common.tolist(), strict=True):
        start, end = int(sequences.offsets[i]), int(sequences.offsets[i + 1]) - 1
        numbers[start : start + shared] = numbers[previous : previous + shared]
        n_new = end - start - shared
        numbers[start + shared : end] = np.arange(n_nodes, n_nodes + n_new)
        n_nodes, previous = n_nodes + n_new, start
    return numbers, n_nodes


def _starts(*keys: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Mark the positions where any key differs from the position before; the first is marked."""
    start = np.ones(len(keys[0]), dtype=np.bool_)
    start[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return start


def _gather(
    sequences: TokenSequences, ids: Ints, begin: int, width: int, limits: NDArray[np.integer]
) -> NDArray[np.int32]:
    """Read tokens begin..begin+width of the first limits[i] of sequence i; padded, (m, width)."""
    column = begin + np.arange(width)
    inside = column < limits[ids, None]
    place = np.where(inside, sequences.offsets[ids, None] + column, 0)
    tokens = np.where(inside, np.asarray(sequences.tokens)[place], _PAD)
    negative = (inside & (tokens < 0)).any(axis=1)
    if negative.any():
        raise DataError(f"sequence {int(ids[negative.argmax()])} holds a negative token id")
    return tokens


def _argsort_rows(matrix: NDArray[np.integer]) -> Ints:
    """Sort the rows of a matrix of integers >= -1 lexicographically; stable."""
    keys = np.ascontiguousarray(matrix + 1, dtype=">u4")  # big-endian bytes compare as numbers
    return np.argsort(keys.view(np.dtype((np.void, keys.shape[1] * 4))).ravel(), kind="stable")


def _prefix_ranks(sequences: TokenSequences, limits: NDArray[np.integer]) -> Ints:
    """Rank the sequences by their first limits[i] >= 1 tokens, (n,), equal prefixes equally.

    Sorts by a few columns at a time and goes on only with those that are still tied.
    """
    order = np.arange(len(sequences))
    starts = np.zeros(len(order), dtype=np.bool_)
    starts[0] = True
    tied, tie, begin = np.arange(len(order)), np.zeros(len(order), dtype=np.int64), 0
    while tied.size:
        columns = _gather(sequences, order[tied], begin, _CHUNK_TOKENS, limits)
        keys = np.column_stack([tie, columns])
        by_key = _argsort_rows(keys)
        order[tied], keys = order[tied][by_key], keys[by_key]
        differs = np.concatenate([[False], np.any(keys[1:] != keys[:-1], axis=1)])
        starts[tied] |= differs
        tie = np.cumsum(differs)
        ongoing = (np.bincount(tie)[tie] > 1) & (keys[:, -1] != _PAD)
        tied, tie, begin = tied[ongoing], tie[ongoing], begin + _CHUNK_TOKENS
    ranks = np.empty_like(order)
    ranks[order] = np.cumsum(starts) - 1
    return ranks


def _common_with_previous(sequences: TokenSequences, ids: Ints) -> Ints:
    """Count the leading tokens that the context of ids[k] shares with that of ids[k - 1], (m,)."""
    common = np.zeros(len(ids), dtype=np.int64)
    limits = sequences.lengths - 1
    equal, begin = np.arange(1, len(ids)), 0
    while equal.size:
        ours = _gather(sequences, ids[equal], begin, _CHUNK_TOKENS, limits)
        theirs = _gather(sequences, ids[equal - 1], begin, _CHUNK_TOKENS, limits)
        same = np.logical_and.accumulate((ours == theirs) & (ours != _PAD), axis=1)
        common[equal] += same.sum(axis=1)
        equal, begin = equal[same[:, -1]], begin + _CHUNK_TOKENS
    return common
