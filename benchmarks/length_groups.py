"""Batches grouped by length, as the Trainer of transformers makes them."""

from collections.abc import Sequence

import numpy as np


def length_grouped(lengths: Sequence[int], batch: int, n_steps: int) -> list[list[int]]:
    """Return one warm-up batch and `n_steps` batches of row numbers, as length grouping makes them.

    All rows are sorted by length and cut into batches, as `group_by_length` of the Trainer does
    with a mega-batch (50 batches); evenly spaced ones are taken, so that they have the mean length
    of all. The warm-up batch is the longest: memory then grows once and no later step is charged.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    n_batches = len(order) // batch
    if n_steps > n_batches:
        raise SystemExit(f"{n_steps} batches of {batch} rows do not fit into {len(order)} rows")
    batches = order[: n_batches * batch].reshape(n_batches, batch)
    ranks = ((np.arange(n_steps) + 0.5) * n_batches / n_steps).astype(int)
    return [batches[0].tolist(), *batches[ranks].tolist()]
