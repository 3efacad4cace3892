"""The order of rows that share prefixes: every row once, the same for a seed, more in a batch."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from torch.utils.data import BatchSampler, DataLoader

from swlora import PrefixSampler
from swlora.data.prefix_tree import count_group_nodes
from swlora.data.token_sequences import TokenSequences
from swlora.errors import UserError

BATCH = 4
RNG = np.random.default_rng(8)
PROMPTS = [RNG.integers(20, 200, 12).tolist() for _ in range(15)]
PAIRS = [(p, RNG.integers(3, 20, 1 + k).tolist()) for k in range(4) for p in PROMPTS]
SEQUENCES = TokenSequences.from_lists(PAIRS)
ROWS = [{"input_ids": [*p, *c], "labels": [-100] * len(p) + c} for p, c in PAIRS]

UNLABELLED = [{"input_ids": row["input_ids"]} for row in ROWS]
ALL_LABELLED = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]


def nodes(order: Iterable[int], batch: int = BATCH) -> int:
    ids = np.fromiter(order, np.int64)
    cuts = range(batch, len(ids), batch)
    return int(count_group_nodes(SEQUENCES, np.split(ids, cuts)).sum())


@pytest.mark.parametrize("order", [None, "prompts", "neighbours", "pairs", "iid"])
@pytest.mark.parametrize("n_rows", [1, 7, 60])
def test_every_row_once_an_epoch_and_another_order_in_each(order: Any, n_rows: int) -> None:
    sampler = PrefixSampler(ROWS[:n_rows], BATCH, order=order, seed=3)
    passes = [list(sampler) for _ in range(3)]
    assert len(sampler) == n_rows
    assert all(sorted(one) == list(range(n_rows)) for one in passes)
    if n_rows > 7:
        assert passes[0] != passes[1] != passes[2]
        assert passes[0] != list(PrefixSampler(ROWS[:n_rows], BATCH, order=order, seed=4))
    sampler.set_epoch(1)
    assert list(sampler) == passes[1]
    assert list(PrefixSampler(ROWS[:n_rows], BATCH, order=order, seed=3)) == passes[0]


def test_batches_share_prompts() -> None:
    shuffled = nodes(PrefixSampler(ROWS, BATCH, order="iid"))
    together = nodes(PrefixSampler(ROWS, BATCH))
    assert together < 0.6 * shuffled
    # Nothing says where a prompt ends: sorted, it falls into two batches at most.
    unlabelled = nodes(PrefixSampler([row["input_ids"] for row in ROWS], BATCH))
    assert unlabelled <= together + sum(len(p) + 3 for p in PROMPTS)


def test_labels_that_leave_nothing_out_tell_of_no_prompts() -> None:
    found = list(PrefixSampler(ALL_LABELLED, BATCH))
    assert found == list(PrefixSampler(UNLABELLED, BATCH))


def test_rows_in_every_form_give_one_order() -> None:
    expected = list(PrefixSampler(ROWS, BATCH))
    assert list(PrefixSampler(Dataset.from_list(ROWS), BATCH)) == expected
    by_ids = list(PrefixSampler([row["input_ids"] for row in ROWS], BATCH))
    assert list(PrefixSampler(UNLABELLED, BATCH)) == by_ids
    assert list(PrefixSampler(Dataset.from_list(UNLABELLED), BATCH)) == by_ids


def test_rows_without_labels_or_with_few_tokens() -> None:
    rows = [{"input_ids": ids, "labels": [-100] * len(ids)} for ids in ([], [5], [5, 6], [5, 6, 7])]
    assert sorted(PrefixSampler(rows, 2)) == [0, 1, 2, 3]


def test_in_loaders_of_torch() -> None:
    expected = list(PrefixSampler(ROWS, BATCH, seed=5))
    chunks = [expected[i : i + BATCH] for i in range(0, len(expected), BATCH)]
    numbers = list(range(len(ROWS)))
    loader: Any = DataLoader(
        numbers, batch_size=BATCH, sampler=PrefixSampler(ROWS, BATCH, seed=5), collate_fn=list
    )
    assert list(loader) == chunks
    batches = BatchSampler(PrefixSampler(ROWS, BATCH, seed=5), BATCH, drop_last=False)
    loader = DataLoader(numbers, batch_sampler=batches, collate_fn=list)
    assert list(loader) == chunks


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "there are none"),
        (IterableDataset.from_generator(lambda: iter(ROWS)), {}, "no length"),
        (["text"], {}, "no column input_ids"),
        ([{"text": "x"}], {}, "no column input_ids"),
        (Dataset.from_list([{"text": "x"}]), {}, "no column input_ids"),
        (ROWS, {"batch_size": 0}, "batch_size must be at least 1"),
        (ROWS, {"seed": -1}, "seed at least 0"),
        (UNLABELLED, {"order": "prompts"}, "'prompts' needs labels of -100 on prompts"),
        (ALL_LABELLED, {"order": "pairs"}, "no row has any; 'neighbours' needs none"),
        (ROWS, {"order": "best"}, "no order is called 'best'; there are prompts"),
    ],
)
def test_what_is_refused(rows: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrefixSampler(rows, **{"batch_size": BATCH} | settings)
