"""A data set: examples by split, what was counted of them, and which prompts they share."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from swlora.config import SAMPLE_DATASET
from swlora.data.examples import Example, PromptKey, select
from swlora.errors import UserError

E2E_NAME = "E2E NLG"
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Counts:
    """What was counted of the rows.

    `bad` are those that were left out, by reason; `n_duplicates` training rows that repeat an
    earlier one word for word; `n_leaked` training rows whose prompt is in dev or test too.
    """

    bad: Mapping[str, int] = field(default_factory=dict)
    n_duplicates: int = 0
    n_leaked: int = 0

    @property
    def n_bad(self) -> int:
        """Bad rows, whatever their reasons."""
        return sum(self.bad.values())


@dataclass(frozen=True)
class Dataset:
    """Examples by split; `separator` stands behind a prompt, `sha256` is of all rows."""

    name: str
    source: str
    separator: str
    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    counts: Counts = Counts()
    sha256: str = ""

    @property
    def is_e2e(self) -> bool:
        """Say whether the rows are E2E NLG, or the sample that stands in for it."""
        return self.name in (E2E_NAME, SAMPLE_DATASET)

    @property
    def is_sample(self) -> bool:
        """Say whether the rows are those that swlora makes itself."""
        return self.name == SAMPLE_DATASET

    def split(self, name: str) -> Sequence[Example]:
        """Return the rows of "train", "dev" or "test"; UserError where there are none."""
        if name not in SPLITS:
            raise UserError(f"no split is called {name!r}; use train, dev or test")
        found: Sequence[Example] = getattr(self, name)
        if not found:
            raise UserError(f"the data set has no {name} split; {self._instead_of(name)}")
        return found

    def has(self, name: str) -> bool:
        """Say whether there are rows of "train", "dev" or "test"."""
        return len(getattr(self, name)) > 0

    def _instead_of(self, name: str) -> str:
        """Say what to do where there are no rows of a split."""
        if name == "train":
            return "name rows to train on with --dataset"
        if other := next(filter(self.has, ("dev", "test")), None):
            return f"use --split {other}"
        return "name rows to evaluate on with --eval-file, or only train them (swlora train)"

    def limited(
        self, train_rows: int | None, train_prompts: int | None, eval_prompts: int | None
    ) -> Self:
        """Return the first rows, or those of the first distinct prompts, counted and hashed."""
        limited = replace(
            self,
            train=first_prompts(self.train, train_prompts)[:train_rows],
            dev=first_prompts(self.dev, eval_prompts),
            test=first_prompts(self.test, eval_prompts),
        )
        digest = hashlib.sha256(json.dumps(self.separator).encode())
        rows, prompts = array("q"), {name: array("q") for name in SPLITS}  # hashes
        for name in SPLITS:
            for example in getattr(limited, name):
                row = json.dumps([name, *example.fields]).encode()
                digest.update(row + b"\n")
                prompts[name].append(hash(example.prompt_key))
                if name == "train":
                    rows.append(hash(row))
        train, dev, test = (np.array(prompts[name]) for name in SPLITS)
        counts = replace(
            self.counts,
            n_duplicates=len(rows) - len(np.unique(np.array(rows))),
            n_leaked=int(np.isin(train, np.union1d(dev, test)).sum()),
        )
        return replace(limited, counts=counts, sha256=digest.hexdigest())


def group_references(examples: Iterable[Example]) -> list[tuple[Example, list[str]]]:
    """List the distinct prompts in file order: the first example of each, all its completions."""
    groups: dict[PromptKey, tuple[Example, list[str]]] = {}
    for example in examples:
        group = groups.setdefault(example.prompt_key, (example, []))
        group[1].append(example.completion)
    return list(groups.values())


@dataclass(frozen=True)
class Asked:
    """The distinct prompts that an evaluation asks of a split, each with all its references.

    `groups` are their numbers among all groups of the split, which are prompts and documents in
    file order; `group_of` (n,) is the group of every sequence. `n_rows` counts the rows.
    """

    examples: list[Example]
    references: list[list[str]]
    groups: list[int]
    group_of: NDArray[np.int64]
    n_rows: int


def asked_of(rows: Sequence[Example], example_ids: NDArray[np.int64]) -> Asked:
    """Return what is asked of a split whose sequences came from `rows`: from which, (n,)."""
    used, row_of = np.unique(example_ids, return_inverse=True)
    usable = select(rows, used)  # without those that could not be encoded
    found = [(k, e, own) for k, (e, own) in enumerate(group_references(usable)) if not e.text]
    return Asked(
        [example for _, example, _ in found],
        [own for _, _, own in found],
        [number for number, _, _ in found],
        number_prompts(usable)[row_of],
        len(usable),
    )


def number_prompts(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the number (n,) of each row's distinct prompt, in the order of `group_references`.

    Prompts are told apart by a hash of 64 bits: among 10^8 of them two would be taken for one with
    a chance of 1 in 4,000, and be held out together.
    """
    hashes = np.fromiter((hash(e.prompt_key) for e in examples), dtype=np.int64)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def first_prompts(examples: Sequence[Example], n: int | None) -> Sequence[Example]:
    """Return the examples of the first `n` distinct prompts; all where `n` is None."""
    if n is None:
        return examples
    return select(examples, np.flatnonzero(number_prompts(examples) < n))
