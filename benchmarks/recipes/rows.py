"""The rows of the recipes as token ids: what is trained on, dev to choose by, test to report.

E2E from its folder, or chats from a grammar (`benchmarks.chat_grammar`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import chat_grammar
from benchmarks import rows as e2e_rows
from swlora.data.dataset import first_prompts, number_prompts
from swlora.data.encode import encode_examples
from swlora.data.examples import Example
from swlora.data.token_sequences import Ints, TokenSequences

DEV_PROMPTS, TEST_PROMPTS = 60, 130
CURVE_ROWS = 2  # of each dev prompt, for what is measured on the way


@dataclass(frozen=True, eq=False)
class Rows:
    """Sequences, and the number of each one's distinct prompt (n,), from 0 without gaps."""

    sequences: TokenSequences
    prompt_of: Ints

    def subset(self, ids: Ints) -> "Rows":
        """Return the rows `ids`, their prompts numbered anew."""
        numbers = np.unique(self.prompt_of[ids], return_inverse=True)[1]
        return Rows(self.sequences.subset(ids), numbers)

    def first_prompts(self, n: int | None) -> "Rows":
        """Return the rows of the first n prompts; all where n is None."""
        if n is None:
            return self
        return self.subset(np.flatnonzero(self.prompt_of < n))

    def first_of_each(self, n: int) -> "Rows":
        """Return the first n rows of every prompt."""
        return self.subset(np.flatnonzero(number_within(self.prompt_of) < n))

    def __len__(self) -> int:
        return len(self.sequences)


class Data:
    """One data set for one model, encoded when it is first asked for."""

    def __init__(self, name: str, loaded: Any, e2e: Path | None) -> None:
        self._name, self._loaded, self._e2e = name, loaded, e2e

    @cached_property
    def train(self) -> Rows:
        """All training rows."""
        return self._rows("train", None)

    @cached_property
    def dev(self) -> Rows:
        """All rows of the first dev prompts, to choose by."""
        return self._rows("dev", DEV_PROMPTS)

    @cached_property
    def curve(self) -> Rows:
        """Few rows of each of those prompts, for the course of a training."""
        return self.dev.first_of_each(CURVE_ROWS)

    @cached_property
    def test(self) -> Rows:
        """All rows of the first test prompts, to report."""
        return self._rows("test", TEST_PROMPTS)

    @cached_property
    def _splits(self) -> tuple[dict[str, Sequence[Example]], str]:
        if self._name == "chats":
            splits = {split: chat_grammar.examples(split) for split in chat_grammar.SIZES}
            return splits, ""
        dataset = e2e_rows.load(e2e_rows.find_e2e(self._e2e))
        return {s: dataset.split(s) for s in ("train", "dev", "test")}, dataset.separator

    def _rows(self, split: str, n_prompts: int | None) -> Rows:
        splits, separator = self._splits
        examples = first_prompts(splits[split], n_prompts)
        encoded = encode_examples(
            examples,
            separator,
            self._loaded.tokenizer,
            context_tokens=self._loaded.context_tokens,
            truncate=False,
        )
        return Rows(encoded.sequences, number_prompts(examples)[encoded.example_ids])


def number_within(prompt_of: Ints) -> Ints:
    """Return how many earlier rows have the same prompt, (n,)."""
    order = np.argsort(prompt_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(prompt_of))])
    within = np.empty_like(order)
    within[order] = np.arange(len(order)) - starts[prompt_of[order]]
    return within
