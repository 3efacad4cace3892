"""An order of rows in which those that share a prefix come into a batch together."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, get_args

import numpy as np
from torch.utils.data import Sampler

from swlora.data.steps import StepOrder, plan_steps
from swlora.data.token_sequences import TokenSequences
from swlora.errors import UserError
from swlora.integrations.batch_rows import IGNORED

_NO_LIMIT = 1 << 40  # of a tree's nodes: a batch is not cut


class PrefixSampler(Sampler[int]):
    """Yields the numbers of rows, each once an epoch, what shares a prefix next to each other.

    `rows` is a dataset with a column `input_ids`, and `labels` where there are any; or a sequence
    of dicts with these names, or of lists of token ids alone. `order` is as of `swlora train
    --order`: "prompts" keeps rows of one identical prompt together, and draws the prompts at
    random; "neighbours" keeps prompts with long common beginnings together, too, which shares more
    and makes the rows of a batch more alike; "pairs" takes two rows of a prompt at a time; "iid"
    single rows. None is "prompts", or "neighbours" where no labels say where a prompt ends.

    Each pass takes another order, the same one for the same seed and epoch; `set_epoch` names the
    epoch, which trainers do. Raises UserError for rows without token ids, and for "prompts" and
    "pairs" where no labels say where a prompt ends.

        sampler = swlora.PrefixSampler(rows, batch_size=16, seed=1)
        loader = DataLoader(rows, batch_size=16, sampler=sampler, collate_fn=collate)
    """

    def __init__(
        self, rows: Any, batch_size: int, *, order: StepOrder | None = None, seed: int = 0
    ) -> None:
        if batch_size < 1 or seed < 0:
            raise UserError("PrefixSampler: batch_size must be at least 1, seed at least 0")
        if order is not None and order not in get_args(StepOrder):
            names = ", ".join(get_args(StepOrder))
            raise UserError(f"PrefixSampler: no order is called {order!r}; there are {names}")
        if not isinstance(rows, Sized) or not len(rows):
            raise UserError("PrefixSampler: the rows have no length, or there are none; a stream "
                            "cannot be put into another order")  # fmt: skip
        ids, labels = _column(rows, "input_ids"), _column(rows, "labels")
        if ids is None:
            raise UserError("PrefixSampler: the rows have no column input_ids; tokenise them first")
        self._batch_size, self._seed = batch_size, seed
        has_prompts = labels is not None and any(map(_leaves_prompt_out, labels))
        if order in ("prompts", "pairs") and not has_prompts:
            raise UserError(
                f"PrefixSampler: {order!r} needs labels of {IGNORED} on prompts, and no row has "
                "any; 'neighbours' needs none"
            )
        self._sequences = _sequences(ids, labels if has_prompts else None)
        self._order: StepOrder = order or ("prompts" if has_prompts else "neighbours")
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[int]:
        steps = plan_steps(
            self._sequences,
            sequences_per_step=self._batch_size,
            max_tokens_per_tree=_NO_LIMIT,
            order=self._order,
            seed=self._seed,
            epoch=self.epoch,
        )
        self.epoch += 1
        for groups in steps:
            yield from np.concatenate(groups).tolist()


def _column(rows: Any, name: str) -> Sequence[Any] | None:
    """Return a column of a dataset, of dicts, or of lists of ids; None where there is none."""
    if hasattr(rows, "column_names"):
        return rows[name] if name in rows.column_names else None
    first = rows[0]
    if isinstance(first, Mapping):
        return [row[name] for row in rows] if name in first else None
    return rows if name == "input_ids" and not isinstance(first, str) else None


def _leaves_prompt_out(labels: Sequence[Any]) -> bool:
    return len(labels) > 1 and int(labels[1]) == IGNORED  # nothing predicts the first


def _sequences(ids: Sequence[Any], labels: Sequence[Any] | None) -> TokenSequences:
    """Return the rows as sequences whose prompt ends where the labels begin, else one token before
    the end. A row without two tokens gets some, since nothing but its place matters.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    for i, row in enumerate(ids):
        tokens = [*map(int, row), *[0] * (2 - len(row))]
        n_prompt = len(tokens) - 1
        if labels is not None:
            trained = (k for k, label in enumerate(labels[i]) if k and int(label) != IGNORED)
            n_prompt = min(next(trained, n_prompt), n_prompt)
        pairs.append((tokens[:n_prompt], tokens[n_prompt:]))
    return TokenSequences.from_lists(pairs)
