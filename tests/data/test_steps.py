"""Plans of steps against their definitions; tokens larger than memory; the E2E data."""

import csv
import time
import tracemalloc
from collections import Counter
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.tries import ORDERS, Pair, data_sets, many_prompts, proper_prefixes

from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.steps import StepOrder, plan_steps
from swlora.data.token_sequences import TokenSequences


def plan(pairs: list[Pair], order: StepOrder, per_step: int, budget: int, seed=0, epoch=0):
    return plan_steps(
        TokenSequences.from_lists(pairs),
        sequences_per_step=per_step,
        max_tokens_per_tree=budget,
        order=order,
        seed=seed,
        epoch=epoch,
    )


@given(
    data_sets, st.sampled_from(ORDERS), st.integers(1, 20), st.integers(1, 60), st.integers(0, 9)
)
@settings(max_examples=300, deadline=None)
def test_plan_holds_every_sequence_once_within_budget(
    pairs: list[Pair], order: StepOrder, per_step: int, budget: int, epoch: int
) -> None:
    sequences = TokenSequences.from_lists(pairs)
    steps = plan(pairs, order, per_step, budget, epoch=epoch)
    assert len(steps) == -(-len(pairs) // per_step)
    planned = [i for step in steps for group in step for i in group.tolist()]
    assert sorted(planned) == [*range(len(pairs))]
    for step in steps:
        assert 1 <= sum(map(len, step)) <= 2 * per_step
        if order == "iid":
            assert abs(sum(map(len, step)) - len(pairs) / len(steps)) < 1
        for group in step:
            nodes = len(build_tree(sequences, group).token_ids)
            assert nodes <= budget or len(group) == 1
            assert nodes == len(proper_prefixes([pairs[i] for i in group]))


@given(data_sets, st.sampled_from(ORDERS), st.integers(1, 20), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_plan_keeps_prompts_together_and_trees_full(
    pairs: list[Pair], order: StepOrder, per_step: int, budget: int
) -> None:
    steps = plan(pairs, order, per_step, budget)
    largest = len(pairs) // len(steps)
    for prompt in {tuple(prompt) for prompt, _ in pairs}:
        members = {i for i, pair in enumerate(pairs) if tuple(pair[0]) == prompt}
        touched = [step for step in steps if any(members & set(group.tolist()) for group in step)]
        if order in ("prompts", "neighbours") and len(members) <= largest:
            assert len(touched) == 1
        for step in touched:
            here = [members & set(group.tolist()) for group in step]
            together = [pairs[i] for i in set().union(*here)]
            if len(proper_prefixes(together)) <= budget:
                assert sum(map(bool, here)) == 1, "a prompt that fits a tree is divided"
    for step in steps:
        longest = sum(len(p + c) - 1 for group in step for p, c in (pairs[i] for i in group))
        if longest <= budget:
            assert len(step) == 1


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_groups_are_cut_no_sooner_than_the_budget_asks(sizes: list[int], budget: int) -> None:
    # No prompt begins with another, so the count is exact: a group and the next one's first prompt
    # must exceed the budget together.
    pairs = [([100 + k, 1], [n, 0, n]) for k, size in enumerate(sizes) for n in range(size)]
    assume(max(2 + 2 * size for size in sizes) <= budget)
    for order in ORDERS:
        for step in plan(pairs, order, len(pairs) // 2 + 1, budget):
            for group, following in pairwise(step):
                prompt = pairs[following[0]][0]
                joined = [pairs[i] for i in group]
                joined += [pairs[i] for i in following if pairs[i][0] == prompt]
                assert len(proper_prefixes(joined)) > budget


def test_sequence_longer_than_the_budget_has_its_own_tree() -> None:
    pairs = [([1], [2, 3, 4, 5, 6, 7, 8, 0])] * 2 + [([1], [2, 0]), ([1], [3, 0]), ([9], [9, 0])]
    for order in ORDERS:
        (step,) = plan(pairs, order, 5, 5)
        assert [group.tolist() for group in step] == [[2], [0], [1], [3, 4]]


def test_prompt_that_just_fits_is_not_begun_in_the_tree_before() -> None:
    # 1 node, then 3 nodes of which 2 would still fit the first tree.
    pairs: list[Pair] = [([1], [0]), ([2], [5, 0]), ([2], [6, 0])]
    for order in ORDERS:
        (step,) = plan(pairs, order, 3, 3)
        assert [group.tolist() for group in step] == [[0], [1, 2]]


@pytest.mark.parametrize("order", ORDERS)
def test_plan_is_a_function_of_seed_and_epoch(order: StepOrder) -> None:
    def listed(seed: int, epoch: int) -> list[list[list[int]]]:
        steps = plan(many_prompts(), order, 8, 40, seed=seed, epoch=epoch)
        return [[group.tolist() for group in step] for step in steps]

    def step_sets(seed: int, epoch: int) -> set[frozenset[int]]:
        return {frozenset(i for group in step for i in group) for step in listed(seed, epoch)}

    assert listed(3, 1) == listed(3, 1)
    plans = [listed(3, 1), listed(3, 2), listed(1, 3), listed(4, 1)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])
    # Not only the order of the steps changes but what they hold.
    assert len(set().union(*(step_sets(0, epoch) for epoch in range(4)))) > len(listed(0, 0))


def step_sets(pairs: list[Pair], order: StepOrder, epoch: int) -> list[set[int]]:
    return [set(ids) for ids in step_ids(pairs, order, 8, epoch)]


def step_ids(pairs: list[Pair], order: StepOrder, per_step: int, epoch: int) -> list[list[int]]:
    steps = plan(pairs, order, per_step, 1000, epoch=epoch)
    return [[i for group in step for i in group.tolist()] for step in steps]


@pytest.mark.parametrize("order", ["neighbours", "prompts"])
def test_only_prompts_larger_than_a_step_are_split(order: StepOrder) -> None:
    pairs = many_prompts()
    for epoch in range(5):
        steps = step_sets(pairs, order, epoch)
        for k in range(53):
            members = {i for i, (prompt, _) in enumerate(pairs) if prompt[1] == 50 + k}
            touched = sum(bool(members & step) for step in steps)
            assert touched == 1 if k != 30 else touched >= 3


def test_blocks_of_neighbours_begin_elsewhere_in_every_epoch() -> None:
    small = [pair for pair in many_prompts() if pair[0][1] != 80]
    one_prompt: list[Pair] = [([5], [n, 0]) for n in range(41)]
    for pairs in (small, one_prompt):
        blocks = [frozenset(block) for e in range(6) for block in step_sets(pairs, "neighbours", e)]
        assert len(set(blocks)) > len(blocks) // 2
        for block in blocks:  # one run of the sorted data, or its two ends
            rest = set(range(len(pairs))) - block
            assert sum(i - 1 not in block for i in block) <= 1 + (min(rest) > 0)


def test_step_boundaries_are_the_nearest_between_prompts() -> None:
    # Prompts of 1, 1, 3 and 3 sequences, from any one on in a circle: steps of 4 + 4 or 5 + 3;
    # filling until 4 are reached would give 6 + 2 as well.
    pairs: list[Pair] = [([k], [n, 0]) for k, size in enumerate((1, 1, 3, 3)) for n in range(size)]
    sizes = set()
    for epoch in range(20):
        steps = plan(pairs, "neighbours", 4, 1000, epoch=epoch)
        sizes.add(tuple(sorted(sum(map(len, step)) for step in steps)))
    assert sizes == {(3, 5), (4, 4)}


def test_prompt_larger_than_a_step_is_divided_at_random() -> None:
    one_prompt: list[Pair] = [([5], [n, 0]) for n in range(41)]
    first, second = (step_sets(one_prompt, "prompts", epoch) for epoch in range(2))
    assert not any(block in second for block in first)
    assert all(max(block) - min(block) >= len(block) for block in first)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(2, 9), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_pairs_of_a_prompt_are_in_different_steps(
    sizes: list[int], per_step: int, epoch: int
) -> None:
    pairs: list[Pair] = [([k + 1], [n, 0]) for k, size in enumerate(sizes) for n in range(size)]
    counts = [
        Counter(pairs[i][0][0] for i in ids) for ids in step_ids(pairs, "pairs", per_step, epoch)
    ]
    size = min(2, len(pairs) // len(counts))
    for k, n in enumerate(sizes):
        found = sorted(count[k + 1] for count in counts)
        if -(-n // size) <= len(counts):
            assert found[-1] <= size
            assert sum(map(bool, found)) == -(-n // size)
        else:
            assert all(found)
    n_units = [sum(-(-n // size) for n in count.values()) for count in counts]
    if all(-(-n // size) <= len(counts) for n in sizes):
        assert max(n_units) - min(n_units) <= 1


def test_pairs_are_drawn_anew_in_every_epoch() -> None:
    pairs: list[Pair] = [([k], [n, 0]) for k in range(60) for n in range(4)]
    met: Counter[frozenset[int]] = Counter()  # rows of a prompt
    shared: Counter[frozenset[int]] = Counter()  # prompts of a step
    for epoch in range(30):
        for ids in step_ids(pairs, "pairs", 8, epoch):
            by_prompt = [
                {i for i in ids if pairs[i][0] == [k]} for k in {pairs[i][0][0] for i in ids}
            ]
            met.update(frozenset(own) for own in by_prompt)
            shared.update(map(frozenset, combinations(sorted({pairs[i][0][0] for i in ids}), 2)))
    assert len(met) == 60 * 6  # every pair of four rows
    assert max(met.values()) <= 22  # of 10 to be expected, in 30 epochs
    assert len(shared) > 60 * 59 / 2 * 0.9


def test_neighbours_share_steps_and_prompts_do_not() -> None:
    def nodes(order: StepOrder) -> int:
        pairs = many_prompts()
        groups = [group for step in plan(pairs, order, 8, 1000, seed=5) for group in step]
        return sum(len(proper_prefixes([pairs[i] for i in group])) for group in groups)

    assert nodes("neighbours") < nodes("prompts") < nodes("pairs") < nodes("iid")


def test_steps_of_neighbours_are_shuffled() -> None:
    # Ascending prompts with a rotation alone would descend once at most.
    pairs = many_prompts()
    firsts = [pairs[step[0][0]][0][0] for step in plan(pairs, "neighbours", 8, 1000)]
    assert sum(a > b for a, b in pairwise(firsts)) > 3


def test_bad_plans_are_refused() -> None:
    pairs: list[Pair] = [([1], [2])]
    for per_step, budget in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            plan(pairs, "iid", per_step, budget)
    with pytest.raises(ValueError, match="unknown order 'sorted'"):
        plan(pairs, "sorted", 1, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ORDERS)
def test_memory_mapped_tokens_give_the_same_trees(order: StepOrder, tmp_path: Path) -> None:
    held = TokenSequences.from_lists(many_prompts())
    held.tokens.tofile(tmp_path / "tokens.bin")
    mapped_tokens = np.memmap(tmp_path / "tokens.bin", dtype=np.int32, mode="r")
    held.weights.tofile(tmp_path / "weights.bin")
    mapped_weights = np.memmap(tmp_path / "weights.bin", dtype=np.bool_, mode="r")
    mapped = TokenSequences(mapped_tokens, held.offsets, mapped_weights)
    assert mapped.tokens is mapped_tokens and mapped.weights is mapped_weights

    def trees(sequences: TokenSequences) -> list[PrefixTree]:
        steps = plan_steps(
            sequences,
            sequences_per_step=8,
            max_tokens_per_tree=50,
            order=order,
            seed=1,
            epoch=0,
        )
        return [build_tree(sequences, ids) for step in steps for ids in step]

    for a, b in zip(trees(held), trees(mapped), strict=True):
        for name in vars(a):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            assert type(getattr(b, name)) is type(getattr(a, name)) is not np.memmap


def test_planning_reads_long_data_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    n, length = 40, 100_000
    np.tile(np.arange(length, dtype=np.int32), n).tofile(path)
    tokens = np.memmap(path, dtype=np.int32, mode="r+")
    tokens[::length] = np.arange(n) % 7  # the first token tells most of them apart
    offsets = np.arange(n + 1, dtype=np.int64) * length
    weights = np.memmap(tmp_path / "weights.bin", dtype=np.bool_, mode="w+", shape=n * length)
    weights[:] = np.tile(np.arange(length) >= 2, n)
    sequences = TokenSequences(tokens, offsets, weights)
    tracemalloc.start()
    steps = plan_steps(
        sequences, sequences_per_step=4, max_tokens_per_tree=10, order="prompts", seed=0, epoch=0
    )
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(steps) == 10
    assert peak_bytes < tokens.nbytes / 20


@cache
def tokenised_e2e(folder: Path) -> TokenSequences:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "gpt2-tokenizer/tokenizer.json"))
    with (folder / "e2e-dataset/trainset.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    prompts = [e.ids for e in tokenizer.encode_batch([row["mr"] + "\n" for row in table])]
    refs = [[*e.ids, 50256] for e in tokenizer.encode_batch([row["ref"] for row in table])]
    return TokenSequences.from_lists(list(zip(prompts, refs, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("per_step", [32, 64])
def test_e2e_trees_shrink(shared_dir: Path, order: StepOrder, per_step: int) -> None:
    e2e = tokenised_e2e(shared_dir)
    # A fresh object each time: ranks are cached on it and belong to the time measured.
    sequences = TokenSequences(e2e.tokens, e2e.offsets, e2e.weights)
    start = time.perf_counter()
    steps = plan_steps(
        sequences,
        sequences_per_step=per_step,
        max_tokens_per_tree=2048,
        order=order,
        seed=0,
        epoch=0,
    )
    planned_s = time.perf_counter() - start
    trees = [build_tree(sequences, ids) for step in steps for ids in step]
    built_s = time.perf_counter() - start - planned_s
    nodes = sum(len(tree.token_ids) for tree in trees)
    total = len(sequences.tokens)
    sizes = [sum(map(len, step)) for step in steps]
    print(
        f"\n{order} {per_step}: {len(steps)} steps of {min(sizes)}-{max(sizes)} sequences, "
        f"{len(trees)} trees, {nodes} of {total} tokens, {total / nodes:.3f}x, "
        f"{sum(len(tree.target_id) for tree in trees)} targets, "
        f"plan {planned_s:.2f} s, build {built_s:.2f} s"
    )
    assert sum(tree.n_target_tokens for tree in trees) == int(
        (sequences.lengths - sequences.prompt_lengths).sum()
    )
    assert max(len(tree.token_ids) for tree in trees) <= 2048
    assert planned_s + built_s < 15
    if order == "iid":
        assert nodes < total
    else:
        assert nodes < total / (1.4 if order == "pairs" else 1.8)
