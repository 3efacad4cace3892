"""A tokenised data set, and the order of its sequences by what they begin with.

Sorted lexicographically, sequences that share a prefix are neighbours: what a trie over them shares
is what each has in common with the one before it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from swlora.data.scratch import GrowingArray
from swlora.errors import DataError

Ints = NDArray[np.int64]

PAD = -1
_BLOCK_ROWS = 1 << 14  # read at a time
# Sequences are compared some columns at a time, 16 of a few sequences and 2 of many, so that memory
# depends neither on the longest sequence nor much on their number.
_MIN_COLUMNS, _MAX_COLUMNS, _CELLS = 2, 16, 1 << 22


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
    def joined(cls, parts: Iterable["TokenSequences"]) -> "TokenSequences":
        """Return the sequences of all parts, in their order; many tokens go to a file."""
        tokens = GrowingArray(np.int32, "the tokens")
        lengths, prompt_lengths = [np.zeros(1, dtype=np.int64)], []
        for part in parts:
            tokens.append(part.tokens)
            lengths.append(part.lengths)
            prompt_lengths.append(part.prompt_lengths)
        offsets = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        return cls(tokens.finished(), offsets, np.concatenate(prompt_lengths))

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
    def ranks(self) -> tuple[Ints, Ints]:
        """Lexicographic dense ranks of the prompts and of the contexts, (n,) each."""
        return _prefix_ranks(self, self.prompt_lengths), _prefix_ranks(self, self.lengths - 1)

    @cached_property
    def sorted_contexts(self) -> tuple[Ints, Ints]:
        """The sequences in the order of their contexts, and what each shares with the last."""
        order = np.argsort(self.ranks[1], kind="stable")
        return order, common_with_previous(self, order)


def gather(
    sequences: TokenSequences, ids: Ints, begin: int, width: int, limits: NDArray[np.integer]
) -> NDArray[np.int32]:
    """Read tokens begin..begin+width of the first limits[i] of sequence i; padded, (m, width).

    Raises DataError for a negative token id.
    """
    found = np.empty((len(ids), width), dtype=np.int32)
    column = begin + np.arange(width)
    for start in range(0, len(ids), _BLOCK_ROWS):  # places take four times as much as tokens
        block = ids[start : start + _BLOCK_ROWS]
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


def _columns_at_once(n_rows: int) -> int:
    return min(_MAX_COLUMNS, max(_MIN_COLUMNS, _CELLS // n_rows))
