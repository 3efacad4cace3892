"""A summary of a data set, as a training leaves it."""

import numpy as np

from swlora.data.summary import DataSummary, SplitSummary, summarise_steps
from swlora.data.token_sequences import TokenSequences

SPLIT = SplitSummary(
    *("train", 42_061, 42_063, 2_000_000, 900_000, 0.45, 54, 75, 90, 8192),
    *(3, 4862, 42_000),
)
# "the cat sat ON THE .", "the cat sat ON A .", "the cat ran OFF ." of docs/one-step.md
CATS = TokenSequences.from_lists(
    [([1, 2, 3], [4, 1, 9]), ([1, 2, 3], [4, 5, 9]), ([1, 2, 6], [7, 9])]
)
SUMMARY = DataSummary(
    *(SPLIT, 17, 12, {"its prompt is empty": 2}),
    steps=summarise_steps(CATS, [[np.array([0, 1, 2])]]),
)
