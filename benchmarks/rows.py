"""The rows that the arms run: one pool of whole prompts.

Arms that are slow run fewer rows than fast ones, so each gets rows that stand for the pool: a
prefix of its prompts, which are in random order, where prompts matter; where lengths matter, every
k-th of the batches that sorting the pool by length gives (`length_groups`).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from swlora.config import DataSpec
from swlora.data.dataset import Dataset, group_references
from swlora.data.examples import Example
from swlora.data.sources import load_dataset

E2E_ROWS = 42_061
SHARED_E2E = Path(__file__).resolve().parents[2] / "shared" / "e2e-dataset"


def find_e2e(given: Path | None) -> Path:
    """Return the E2E folder: the argument, else $SWLORA_E2E, else ../shared/e2e-dataset."""
    folder = given or Path(os.environ.get("SWLORA_E2E", SHARED_E2E))
    if not (folder / "trainset.csv").is_file():
        raise SystemExit(f"{folder} is no E2E folder; give one with --e2e or SWLORA_E2E")
    return folder.resolve()


def load(path: Path) -> Dataset:
    """Load an E2E folder or a .jsonl file of prompts and completions."""
    return load_dataset(DataSpec(name=str(path)))


def pool(examples: Sequence[Example], n_rows: int, seed: int = 0) -> list[Example]:
    """Return `n_rows` rows of whole prompts (the last one may be cut), prompts in random order."""
    groups = group_references(examples)
    rows: list[Example] = []
    for g in np.random.default_rng(seed).permutation(len(groups)):
        example, completions = groups[g]
        rows += [Example(example.prompt, text) for text in completions]
        if len(rows) >= n_rows:
            break
    if len(rows) < n_rows:
        raise SystemExit(f"{n_rows} rows are wanted and the data set has {len(rows)}")
    return rows[:n_rows]
