"""A tokenised data set, and the order of its sequences by what they begin with.

Sorted lexicographically, sequences that share a prefix are neighbours: what a trie over them shares
is what each has in common with the one before it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from swlora.data.scratch import GrowingArray
from swlora.errors import DataError

Ints = NDArray[np.int64]
Weights = NDArray[np.bool_] | NDArray[np.float32]

PAD = -1
_BLOCK_SEQUENCES = 1 << 14  # sequences read at a time
_BLOCK_TOKENS = 1 << 20  # read at a time
# Sequences are compared some columns at a time, 16 of a few sequences and 2 of many, so that memory
# depends neither on the longest sequence nor much on their number.
_MIN_COLUMNS, _MAX_COLUMNS, _CELLS = 2, 16, 1 << 22


@dataclass(frozen=True, eq=False)
class TokenSequences:
    """A tokenised data set: sequence i is `tokens[offsets[i]:offsets[i + 1]]`.

    The loss of every token is multiplied by its weight: 0 is not trained, 1 is, fractions count in
    part. What comes before a sequence's first trained token is its prompt; more tokens that are not
    trained may follow later, such as the turns of a user.

    tokens (total,) int32 and weights (total,), bool or, for fractions, float32, are in memory or
    np.memmaps and never copied whole; offsets (n + 1,) int64. Raises DataError naming the first
    sequence whose first token is trained (nothing comes before it that could predict it) or that
    has no trained token, ValueError where the arrays do not fit together.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    weights: Weights

    def __post_init__(self) -> None:
        for name, dtypes in (
            ("tokens", (np.int32,)),
            ("offsets", (np.int64,)),
            ("weights", (np.bool_, np.float32)),
        ):
            array = getattr(self, name)
            if array.dtype not in dtypes or array.ndim != 1:
                names = " or ".join(str(np.dtype(dtype)) for dtype in dtypes)
                raise ValueError(f"{name} must be one-dimensional {names}")
        if len(self.weights) != len(self.tokens):
            raise ValueError("weights must have one entry for every token")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise ValueError("offsets must run from 0 to the number of tokens")
        if len(self) == 0:
            raise DataError("the data set holds no sequences")
        _check_weights(self.weights)
        for bad, what in (
            ((self.prompt_lengths < 1) & (self.lengths > 0), "prompt"),
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
        lengths = np.array([len(ids) for pair in pairs for ids in pair], dtype=np.int64)
        flat = chain.from_iterable(chain.from_iterable(pairs))
        return cls(
            np.fromiter(flat, dtype=np.int32, count=int(lengths.sum())),
            np.concatenate([[0], np.cumsum(lengths)[1::2]]),
            np.repeat(np.tile([False, True], len(pairs)), lengths),
        )

    @classmethod
    def from_weighted(
        cls, sequences: Sequence[tuple[Sequence[int], Sequence[float]]]
    ) -> "TokenSequences":
        """Build from (token ids, weight of each) pairs; ValueError for a weight below 0."""
        for i, (ids, own) in enumerate(sequences):
            if len(ids) != len(own):
                raise ValueError(f"sequence {i} has {len(ids)} tokens and {len(own)} weights")
        lengths = np.array([0, *(len(ids) for ids, _ in sequences)], dtype=np.int64)
        all_ids = chain.from_iterable(ids for ids, _ in sequences)
        all_weights = chain.from_iterable(own for _, own in sequences)
        tokens = np.fromiter(all_ids, dtype=np.int32, count=int(lengths.sum()))
        weights = np.fromiter(all_weights, dtype=np.float32, count=len(tokens))
        is_whole = bool(np.isin(weights, (0, 1)).all())
        return cls(tokens, np.cumsum(lengths), weights.astype(np.bool_) if is_whole else weights)

    @classmethod
    def from_runs(
        cls, sequences: Sequence[tuple[list[int], list[tuple[int, float]]]]
    ) -> "TokenSequences":
        """Build from (token ids, runs) pairs; a run is a number of tokens and their weight."""
        lengths = np.array([0, *(len(ids) for ids, _ in sequences)], dtype=np.int64)
        flat = chain.from_iterable(ids for ids, _ in sequences)
        tokens = np.fromiter(flat, dtype=np.int32, count=int(lengths.sum()))
        runs = [run for _, own in sequences for run in own]
        weights = np.array([weight for _, weight in runs], dtype=np.float32)
        if np.isin(weights, (0, 1)).all():
            weights = weights.astype(np.bool_)
        return cls(tokens, np.cumsum(lengths), np.repeat(weights, [n for n, _ in runs]))

    @classmethod
    def joined(cls, parts: Iterable["TokenSequences"]) -> "TokenSequences":
        """Return the sequences of all parts, in their order; many tokens go to files."""
        tokens = GrowingArray(np.int32, "the tokens")
        weights = GrowingArray(np.bool_, "the weights of the tokens")
        lengths = [np.zeros(1, dtype=np.int64)]
        for part in parts:
            if part.weights.dtype == np.float32:
                weights = weights.widened(np.float32)
            tokens.append(part.tokens)
            weights.append(part.weights)
            lengths.append(part.lengths)
        offsets = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        return cls(tokens.finished(), offsets, weights.finished())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def subset(self, ids: Ints) -> "TokenSequences":
        """Return the sequences with these numbers, in their order; copies of their tokens."""
        lengths = self.lengths[ids]
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[ids] - offsets[:-1], lengths)
        return type(self)(np.asarray(self.tokens)[places], offsets, self.weights[places])

    def length(self, i: int) -> int:
        """Return the number of tokens of sequence i."""
        return int(self.offsets[i + 1] - self.offsets[i])

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of every sequence, (n,) int64."""
        return np.diff(self.offsets)

    @cached_property
    def prompt_lengths(self) -> NDArray[np.int32]:
        """Tokens before the first trained one of every sequence, (n,); all where none is."""
        first = np.minimum(_first_trained(self.weights, self.offsets[:-1]), self.offsets[1:])
        return (first - self.offsets[:-1]).astype(np.int32)

    def sha256(self) -> str:
        """Hash tokens, lengths and trained weights, whether bool or float32, a block at a time."""
        digest = hashlib.sha256()
        for array, dtype in ((self.lengths, "<i8"), (self.tokens, "<i4"), (self.weights, "<f4")):
            for start in range(0, len(array), _BLOCK_TOKENS):
                block = array[start : start + _BLOCK_TOKENS]
                digest.update(np.ascontiguousarray(block, dtype=dtype).data)
        return digest.hexdigest()

    @cached_property
    def ranks(self) -> tuple[Ints, Ints]:
        """Lexicographic dense ranks of the prompts and of the contexts, (n,) each."""
        return _prefix_ranks(self, self.prompt_lengths), _prefix_ranks(self, self.lengths - 1)

    @cached_property
    def sorted_contexts(self) -> tuple[Ints, Ints]:
        """The sequences in the order of their contexts, and what each shares with the last."""
        order = np.argsort(self.ranks[1], kind="stable")
        return order, common_with_previous(self, order)


def _check_weights(weights: Weights) -> None:
    """Raise ValueError for a weight that is negative or not finite."""
    if weights.dtype == np.bool_:
        return
    for start in range(0, len(weights), _BLOCK_TOKENS):
        block = weights[start : start + _BLOCK_TOKENS]
        if not ((block >= 0) & (block < np.inf)).all():
            raise ValueError("weights must be finite numbers and none below 0")


def _first_trained(weights: Weights, starts: Ints) -> Ints:
    """Return the place of the first weight that is not 0 from each of `starts` on, (n,).

    starts (n,) ascend; where there is no such weight the place is len(weights).
    """
    places = np.full(len(starts), len(weights))
    later = len(weights)  # the first one behind the block
    for begin in reversed(range(0, len(weights), _BLOCK_TOKENS)):
        trained = begin + np.flatnonzero(weights[begin : begin + _BLOCK_TOKENS])
        trained = np.append(trained, later)
        first, last = np.searchsorted(starts, (begin, begin + _BLOCK_TOKENS))
        places[first:last] = trained[np.searchsorted(trained, starts[first:last])]
        later = int(trained[0])
    return places


def gather(
    sequences: TokenSequences, ids: Ints, begin: int, width: int, limits: NDArray[np.integer]
) -> NDArray[np.int32]:
    """Read tokens begin..begin+width of the first limits[i] of sequence i; padded, (m, width).

    Raises DataError for a negative token id.
    """
    found = np.empty((len(ids), width), dtype=np.int32)
    column = begin + np.arange(width)
    for start in range(0, len(ids), _BLOCK_SEQUENCES):  # places take four times as much as tokens
        block = ids[start : start + _BLOCK_SEQUENCES]
        inside = column < limits[block, None]
        place = np.where(inside, sequences.offsets[block, None] + column, 0)
        tokens = np.where(inside, np.asarray(sequences.tokens)[place], PAD)
        negative = (inside & (tokens < 0)).any(axis=1)
        if negative.any():
            raise DataError(f"sequence {int(block[negative.argmax()])} holds a negative token id")
        found[start : start + len(block)] = tokens
    return found


def argsort_rows(matrix: NDArray[np.integer]) -> Ints:
    """Sort the rows of a matrix of integers >= -1 lexicographically; stable."""
    n_rows, width = matrix.shape
    keys = np.empty((n_rows, width), dtype=">u4")  # big-endian bytes compare as numbers
    np.add(matrix, 1, out=keys, dtype=np.int64, casting="unsafe")
    return np.argsort(keys.view(np.dtype((np.void, width * 4))).ravel(), kind="stable")


def _prefix_ranks(sequences: TokenSequences, limits: NDArray[np.integer]) -> Ints:
    """Rank the sequences by their first limits[i] >= 1 tokens, (n,), equal prefixes equally.

    Sorts by a few columns at a time and goes on only with those that are still tied.
    """
    order = np.arange(len(sequences))
    starts = np.zeros(len(order), dtype=np.bool_)
    starts[0] = True
    tied, tie, begin = np.arange(len(order)), np.zeros(len(order), dtype=np.int64), 0
    while tied.size:
        width = _columns_at_once(len(tied))
        columns = gather(sequences, order[tied], begin, width, limits)
        keys = np.column_stack([tie.astype(np.int32), columns])
        del columns
        by_key = argsort_rows(keys)
        order[tied], keys = order[tied][by_key], keys[by_key]
        differs = np.concatenate([[False], np.any(keys[1:] != keys[:-1], axis=1)])
        starts[tied] |= differs
        tie = np.cumsum(differs)
        ongoing = (np.bincount(tie)[tie] > 1) & (keys[:, -1] != PAD)
        tied, tie, begin = tied[ongoing], tie[ongoing], begin + width
    ranks = np.empty_like(order)
    ranks[order] = np.cumsum(starts) - 1
    return ranks


def common_with_previous(sequences: TokenSequences, ids: Ints) -> Ints:
    """Count the leading tokens that the context of ids[k] shares with that of ids[k - 1], (m,)."""
    common = np.zeros(len(ids), dtype=np.int64)
    limits = sequences.lengths - 1
    equal, begin = np.arange(1, len(ids)), 0
    while equal.size:
        width = _columns_at_once(len(equal))
        ours = gather(sequences, ids[equal], begin, width, limits)
        theirs = gather(sequences, ids[equal - 1], begin, width, limits)
        same = np.logical_and.accumulate((ours == theirs) & (ours != PAD), axis=1)
        common[equal] += same.sum(axis=1)
        equal, begin = equal[same[:, -1]], begin + width
    return common


def _columns_at_once(n_sequences: int) -> int:
    return min(_MAX_COLUMNS, max(_MIN_COLUMNS, _CELLS // n_sequences))
