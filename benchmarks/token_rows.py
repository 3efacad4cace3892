"""Rows as token ids, with the trained ones marked: what arms in other environments are handed.

Nothing here needs swlora, so that a peer with an environment of its own can read them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the label of a token that is not trained


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Row i is `tokens[offsets[i]:offsets[i + 1]]`.

    tokens (total,) int32; offsets (n + 1,) int64; trained (total,) bool.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    trained: NDArray[np.bool_]

    @classmethod
    def from_parts(cls, rows: Iterable[Sequence[tuple[Sequence[int], bool]]]) -> "TokenRows":
        """Build from rows that are lists of (token ids, whether they are trained)."""
        rows = list(rows)
        parts = [part for row in rows for part in row]
        lengths = [sum(len(ids) for ids, _ in row) for row in rows]
        tokens = np.array([i for ids, _ in parts for i in ids], dtype=np.int32)
        trained = np.repeat([is_trained for _, is_trained in parts], [len(ids) for ids, _ in parts])
        return cls(tokens, np.cumsum([0, *lengths]), trained.astype(np.bool_))

    @classmethod
    def load(cls, path: Path) -> "TokenRows":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["tokens"], arrays["offsets"], arrays["trained"])

    def save(self, path: Path) -> None:
        """Write the rows to an .npz file."""
        np.savez(path, tokens=self.tokens, offsets=self.offsets, trained=self.trained)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return [int(n) for n in np.diff(self.offsets)]

    def first(self, n: int) -> "TokenRows":
        """Return the first n rows."""
        end = int(self.offsets[min(n, len(self))])
        return TokenRows(self.tokens[:end], self.offsets[: n + 1], self.trained[:end])

    def items(self) -> list[dict[str, list[int]]]:
        """Return every row as a Trainer takes it: `input_ids` and `labels`."""
        labels = np.where(self.trained, self.tokens, IGNORED)
        return [
            {"input_ids": self.tokens[a:b].tolist(), "labels": labels[a:b].tolist()}
            for a, b in pairwise(self.offsets.tolist())
        ]
