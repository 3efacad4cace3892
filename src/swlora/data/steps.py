"""An epoch as optimizer steps: which sequences each takes, and in which trees.

What shares a prefix should share a step, so that the prefix is computed once; which neighbours
meet, and where a large prompt is divided, differs from epoch to epoch.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from swlora.data.token_sequences import Ints, TokenSequences, common_with_previous

StepOrder = Literal["prompts", "pairs", "neighbours", "iid"]


def steps_per_epoch(n_sequences: int, sequences_per_step: int) -> int:
    """Return how many steps `plan_steps` makes of so many sequences."""
    return -(-n_sequences // sequences_per_step)


def plan_steps(
    sequences: TokenSequences,
    *,
    sequences_per_step: int,
    max_tokens_per_tree: int,
    order: StepOrder,
    seed: int,
    epoch: int,
) -> list[list[Ints]]:
    """Plan one epoch: optimizer steps, each a list of groups, each the ids of one `build_tree`.

    Every sequence comes exactly once; the same (seed, epoch) gives the same plan. An epoch always
    has ceil(n / sequences_per_step) steps, all within one unit of their mean, n / steps (with
    "pairs" it is their numbers of units that differ by one):
    - "iid": single sequences, shuffled;
    - "pairs": two sequences of one identical prompt, and one where it has no more; what is left of
      the prompt is in other steps, while there are others;
    - "prompts": the sequences of one identical prompt stay together, the prompts are shuffled;
    - "neighbours": so do lexicographically neighbouring prompts; where a step begins differs from
      epoch to epoch, and the steps are shuffled.
    Prompts with more sequences than a step holds are split. A step is cut into as few groups
    as a greedy pass finds whose trees have `max_tokens_per_tree` nodes at most; a sequence longer
    than that is alone, and a prompt is divided between trees only where it does not fit one.
    """
    if sequences_per_step < 1 or max_tokens_per_tree < 1:
        raise ValueError("sequences_per_step and max_tokens_per_tree must be at least 1")
    rng = np.random.default_rng([seed, epoch])
    n_steps = steps_per_epoch(len(sequences), sequences_per_step)
    largest = len(sequences) // n_steps  # so that there are units for all steps
    if order == "iid":
        step = _in_equal_shares(rng.permutation(len(sequences)), n_steps, rng)
    elif order == "prompts" or order == "neighbours":
        step = _in_equal_shares(_prompt_units(sequences, largest, order, rng), n_steps, rng)
    elif order == "pairs":
        step = _dealt(sequences.ranks[0], min(2, largest), n_steps, rng)
    else:
        raise ValueError(f"unknown order {order!r}: use prompts, pairs, neighbours or iid")
    prompt, context = sequences.ranks
    ids = np.lexsort((context, prompt, step))
    return _cut_groups(sequences, ids, step[ids], max_tokens_per_tree)


def _prompt_units(
    sequences: TokenSequences, largest: int, order: StepOrder, rng: np.random.Generator
) -> Ints:
    """Number the units that stay in one step, (n,): a prompt's sequences, or `largest` of them.

    Larger prompts are divided at another place every time: among neighbouring completions for
    "neighbours", at random for "prompts".
    """
    prompt, context = sequences.ranks
    within = context if order == "neighbours" else rng.permutation(len(sequences))
    ids = np.lexsort((within, prompt))
    sizes = np.bincount(prompt)
    position = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shift = np.repeat(np.where(sizes > largest, rng.integers(largest), 0), sizes)
    piece = (position + shift) // largest
    unit_sorted = np.cumsum(_starts(prompt[ids], piece)) - 1
    n_units = int(unit_sorted[-1]) + 1
    if order == "neighbours":
        turn = (np.arange(n_units) + rng.integers(n_units)) % n_units
    else:
        turn = rng.permutation(n_units)
    unit = np.empty_like(unit_sorted)
    unit[ids] = turn[unit_sorted]
    return unit


def _in_equal_shares(unit: Ints, n_steps: int, rng: np.random.Generator) -> Ints:
    """Return the step of every sequence, (n,), with units that follow one another in one step.

    A unit goes to the step in whose equal share of the epoch its middle lies, which keeps sizes
    closest to the mean. Units are no larger than a share, so no step stays empty.
    """
    sizes = np.bincount(unit)
    step_of_unit = (2 * np.cumsum(sizes) - sizes) * n_steps // (2 * len(unit))
    step: Ints = rng.permutation(n_steps)[step_of_unit[unit]]
    return step


def _dealt(prompt: Ints, size: int, n_steps: int, rng: np.random.Generator) -> Ints:
    """Return the step of every sequence, (n,), with a prompt's dealt to steps, `size` at a time.

    The prompts follow one another at random. In every round each step gets one unit, in a new
    order; a prompt that one round does not end begins the next with steps that it has not had.
    """
    n = len(prompt)
    shuffled = rng.permutation(int(prompt.max()) + 1)[prompt]
    ids = np.lexsort((rng.permutation(n), shuffled))
    sizes = np.bincount(shuffled)
    position = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    starts = _starts(shuffled[ids], position // size)
    of_prompt = shuffled[ids][starts]  # every unit
    step_of_unit = np.empty_like(of_prompt)
    for begin in range(0, len(of_prompt), n_steps):
        last = slice(max(begin - n_steps, 0), begin)
        now = of_prompt[begin : begin + n_steps]
        had = step_of_unit[last][of_prompt[last] == now[0]]
        turn = rng.permutation(n_steps)
        turn = turn[np.argsort(np.isin(turn, had), kind="stable")]
        n_first = int(np.searchsorted(now, now[0], side="right"))
        turn[n_first:] = rng.permutation(turn[n_first:])
        step_of_unit[begin : begin + n_steps] = turn[: len(now)]
    step = np.empty_like(prompt)
    step[ids] = step_of_unit[np.cumsum(starts) - 1]
    return step


def cut_group(sequences: TokenSequences, ids: Ints, most_nodes: int) -> list[Ints]:
    """Cut a group of `plan_steps` into groups whose trees have `most_nodes` at most, as it does."""
    return _cut_groups(sequences, ids, np.zeros(len(ids), np.int64), most_nodes)[0]


def _cut_groups(sequences: TokenSequences, ids: Ints, step: Ints, budget: int) -> list[list[Ints]]:
    """Cut ids, sorted by step and within it by prompt and context, into the groups of every step.

    Counts nodes from common prefixes of neighbours: exact, but for prompts that begin with another
    prompt of the group, where it may count some twice; so a tree never exceeds the budget.
    """
    context = (sequences.lengths - 1)[ids]
    added = context - common_with_previous(sequences, ids)
    total = np.concatenate([[0], np.cumsum(added)])
    prompt = sequences.ranks[0][ids]
    prompts = np.append(np.flatnonzero(_starts(step, prompt)), len(ids))
    # A prompt's sequences together, where they fit a tree, else one by one.
    whole = context[prompts[:-1]] + total[prompts[1:]] - total[prompts[:-1] + 1] <= budget
    divided = zip(prompts[:-1][~whole], prompts[1:][~whole], strict=True)
    splits = [np.arange(start, end) for start, end in divided]
    parts = np.unique(np.concatenate([prompts, *splits]))
    alone = context[parts[:-1]] + total[parts[1:]] - total[parts[:-1] + 1]
    joined = total[parts[1:]] - total[parts[:-1]]

    new_step = _starts(step)[parts[:-1]]
    cuts, used = [], 0
    columns = (parts[:-1], new_step, alone, joined)
    for start, first, nodes_alone, nodes_joined in zip(*(c.tolist() for c in columns), strict=True):
        if first or used + nodes_joined > budget:
            cuts.append(start)
            used = nodes_alone
        else:
            used += nodes_joined
    steps: list[list[Ints]] = []
    for start, group in zip(cuts, np.split(ids, cuts[1:]), strict=True):
        if start == 0 or step[start] != step[start - 1]:
            steps.append([])
        steps[-1].append(group)
    return steps


def _starts(*keys: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Mark the positions where any key differs from the position before; the first is marked."""
    start = np.ones(len(keys[0]), dtype=np.bool_)
    start[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return start
