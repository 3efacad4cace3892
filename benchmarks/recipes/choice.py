"""Which of the rows are trained on: two of a prompt at a time, by one measure or another.

    random    drawn                        hard, easy, middle   by their loss in the base model
    diverse   prompts unlike each other: always the one farthest from those that are chosen
              (the greedy k-center of core-sets, arXiv 1708.00489)

Of twice as many candidates as are chosen, for the losses cost time, which counts as the training's.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.recipes.rows import Rows, number_within
from swlora.data.token_sequences import Ints
from swlora.errors import UserError
from swlora.evaluation.loss import grouped_losses
from swlora.progress import Silent

UNIT_ROWS = 2  # rows of a prompt that are chosen or left together, as `order=pairs` runs them
CANDIDATES = 2  # times as many units have their loss measured as are chosen
HELD_OUT_PROMPTS = 16


def chosen(rows: Rows, n_rows: int, choice: str, model: Any, seed: int) -> Rows:
    """Return about `n_rows` of the rows, in their order; UserError where there are too few."""
    if n_rows > len(rows):
        raise UserError(f"rows={n_rows} are wanted, and there are {len(rows)}")
    rng = np.random.default_rng([seed, n_rows])
    units = _units(rows, rng)
    if choice == "random":
        taken = units
    elif choice == "diverse":
        taken = _unlike(rows, units, n_rows, rng)
    else:
        few = _enough(units, CANDIDATES * n_rows)
        taken = [few[i] for i in _by_loss(rows, few, choice, model)]
    return rows.subset(np.sort(np.concatenate(_enough(taken, n_rows))))


def without_some(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    """Return the rows without those of a few prompts, and two rows of each of these."""
    n_prompts = int(rows.prompt_of.max()) + 1
    if n_prompts <= HELD_OUT_PROMPTS:
        raise UserError(f"jump holds out {HELD_OUT_PROMPTS} prompts, and there are {n_prompts}")
    rng = np.random.default_rng([seed, HELD_OUT_PROMPTS])
    is_out = np.isin(rows.prompt_of, rng.permutation(n_prompts)[:HELD_OUT_PROMPTS])
    held_out = rows.subset(np.flatnonzero(is_out)).first_of_each(UNIT_ROWS)
    return rows.subset(np.flatnonzero(~is_out)), held_out


def _units(rows: Rows, rng: np.random.Generator) -> list[Ints]:
    """Return the ids of the rows, two of a prompt at a time, in random order."""
    shuffled = rng.permutation(len(rows))
    number = number_within(rows.prompt_of[shuffled]) // UNIT_ROWS
    order = np.lexsort((number, rows.prompt_of[shuffled]))
    prompt, number = rows.prompt_of[shuffled][order], number[order]
    starts = np.flatnonzero((np.diff(prompt) != 0) | (np.diff(number) != 0)) + 1
    units = np.split(shuffled[order], starts)
    return [units[i] for i in rng.permutation(len(units))]


def _enough(units: list[Ints], n_rows: int) -> list[Ints]:
    """Return the first units that hold `n_rows` rows; all where they hold fewer."""
    n_so_far = np.cumsum([len(unit) for unit in units])
    return units[: int(np.searchsorted(n_so_far, n_rows)) + 1]


def _by_loss(rows: Rows, units: list[Ints], choice: str, model: Any) -> Ints:
    """Return the numbers of the units, those first that `choice` wants."""
    group = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    sequences = rows.sequences.subset(np.concatenate(units))
    losses = grouped_losses(model, sequences, group, Silent())
    nats = np.array([loss.nats_per_token for loss in losses])
    key = {"hard": -nats, "easy": nats, "middle": np.abs(nats - np.median(nats))}[choice]
    return np.argsort(key, kind="stable")


def _unlike(rows: Rows, units: list[Ints], n_rows: int, rng: np.random.Generator) -> list[Ints]:
    """Return units of prompts in the order in which each is farthest from all before it.

    The distance is 1 - cosine of the sets of tokens of the prompts; one unit of each prompt.
    """
    units = sorted(units, key=len, reverse=True)  # of a prompt's units one that is full
    prompts = rows.prompt_of[[int(unit[0]) for unit in units]]
    first = np.unique(prompts, return_index=True)[1]
    sets = _token_sets(rows, np.array([int(units[i][0]) for i in first]))
    taken = [int(rng.integers(len(first)))]
    nearest = sets @ sets[taken[0]]
    while len(taken) < min(-(-n_rows // UNIT_ROWS), len(first)):
        nearest[taken[-1]] = np.inf
        taken.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, sets @ sets[taken[-1]])
    rest = np.setdiff1d(np.arange(len(units)), first[taken])
    return [units[i] for i in [*first[taken], *rest]]


def _token_sets(rows: Rows, ids: Ints) -> NDArray[np.float32]:
    """Return for each row which tokens its prompt has, (n, tokens that occur), of length 1."""
    sequences, ends = rows.sequences, rows.sequences.prompt_lengths
    prompts = [sequences.tokens[sequences.offsets[i] :][: ends[i]] for i in ids]
    known, number = np.unique(np.concatenate(prompts), return_inverse=True)
    sets = np.zeros((len(ids), len(known)), dtype=np.float32)
    sets[np.repeat(np.arange(len(ids)), [len(p) for p in prompts]), number] = 1
    return sets / np.linalg.norm(sets, axis=1, keepdims=True)
