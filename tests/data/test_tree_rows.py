"""Tree rows against tries of plain dictionaries, and plans against their definitions."""

import csv
import time
import tracemalloc
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swlora.data.tree_rows import (
    StepOrder,
    TokenSequences,
    TreeRow,
    build_row,
    number_nodes,
    plan_steps,
)
from swlora.errors import DataError, UserError

Pair = tuple[list[int], list[int]]
ORDERS: tuple[StepOrder, ...] = ("neighbours", "prompts", "iid")

# Three tokens and short lists make duplicates, nested prompts and shared prefixes common; the
# common head (0 to 40 times one token) reaches past the columns compared at a time.
tokens = st.integers(0, 2)
pairs_without_head = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, min_size=1, max_size=6)),
    min_size=1,
    max_size=14,
)
pairs_with_head = st.builds(
    lambda head, pairs: [([1] * head + prompt, completion) for prompt, completion in pairs],
    st.integers(0, 40),
    pairs_without_head,
)
data_sets = st.one_of(pairs_without_head, pairs_with_head)


def everything(pairs: list[Pair]) -> tuple[TokenSequences, TreeRow]:
    sequences = TokenSequences.from_lists(pairs)
    return sequences, build_row(sequences, np.arange(len(pairs)))


def proper_prefixes(pairs: list[Pair]) -> set[tuple[int, ...]]:
    return {tuple((p + c)[:end]) for p, c in pairs for end in range(1, len(p + c))}


def visible(row: TreeRow, i: int) -> list[int]:
    return [j for j in range(len(row.token_ids)) if j <= i < row.subtree_end[j]]


def paths(row: TreeRow) -> list[tuple[int, ...]]:
    """Each node's tokens from the root, read off by its visibility alone."""
    return [tuple(row.token_ids[visible(row, i)].tolist()) for i in range(len(row.token_ids))]


def naive_targets(pairs: list[Pair]) -> Counter[tuple[tuple[int, ...], int]]:
    counts: Counter[tuple[tuple[int, ...], int]] = Counter()
    for prompt, completion in pairs:
        text = prompt + completion
        for place in range(len(prompt), len(text)):
            counts[tuple(text[:place]), text[place]] += 1
    return counts


def row_targets(row: TreeRow) -> dict[tuple[tuple[int, ...], int], float]:
    path = paths(row)
    triples = zip(row.target_position, row.target_id, row.target_weight, strict=True)
    listed = [((path[position], int(token)), float(weight)) for position, token, weight in triples]
    assert len(dict(listed)) == len(listed), "a target is listed twice"
    return dict(listed)


def assert_row_is_the_trie(row: TreeRow, pairs: list[Pair]) -> None:
    path = paths(row)
    assert set(path) == proper_prefixes(pairs)
    assert len(set(path)) == len(path), "a prefix has two nodes"
    assert row.position_ids.tolist() == [len(p) - 1 for p in path]
    node = {p: i for i, p in enumerate(path)}
    for prompt, completion in pairs:
        context = (prompt + completion)[:-1]
        chain = [node[tuple(context[: end + 1])] for end in range(len(context))]
        assert visible(row, chain[-1]) == chain
    assert row_targets(row) == naive_targets(pairs)
    assert row.n_target_tokens == sum(len(completion) for _, completion in pairs)
    assert row.n_sequences == len(pairs)


@given(data_sets)
@settings(max_examples=150, deadline=None)
def test_row_is_the_naive_trie(pairs: list[Pair]) -> None:
    _, row = everything(pairs)
    assert_row_is_the_trie(row, pairs)
    assert sorted(row.sequence_ids.tolist()) == list(range(len(pairs)))


@given(data_sets, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_row_of_a_subset_depends_on_no_order_of_ids(pairs, random) -> None:
    ids = random.sample(range(len(pairs)), random.randint(1, len(pairs)))
    sequences = TokenSequences.from_lists(pairs)
    row = build_row(sequences, np.array(ids))
    assert_row_is_the_trie(row, [pairs[i] for i in ids])
    other = build_row(sequences, np.array(sorted(ids)))
    for name in ("token_ids", "position_ids", "subtree_end", "target_position", "target_id"):
        np.testing.assert_array_equal(getattr(row, name), getattr(other, name))
    np.testing.assert_array_equal(row.target_weight, other.target_weight)


def paths_of_tokens(sequences: TokenSequences) -> list[tuple[int, ...] | None]:
    """Everything up to each token of the data, None for the last token of a sequence."""
    found: list[tuple[int, ...] | None] = []
    for start, end in pairwise(sequences.offsets.tolist()):
        text = tuple(sequences.tokens[start:end].tolist())
        found += [text[: n + 1] for n in range(len(text) - 1)]
        found.append(None)
    return found


@given(data_sets)
@settings(max_examples=150, deadline=None)
def test_nodes_are_numbered_by_everything_up_to_them(pairs: list[Pair]) -> None:
    sequences = TokenSequences.from_lists(pairs)
    numbers, n_nodes = number_nodes(sequences)
    assert numbers.dtype == np.int64 and len(numbers) == len(sequences.tokens)
    number_of: dict[tuple[int, ...], int] = {}
    for number, path in zip(numbers.tolist(), paths_of_tokens(sequences), strict=True):
        if path is None:
            assert number == -1
        else:
            assert number_of.setdefault(path, number) == number
    assert n_nodes == len(proper_prefixes(pairs))
    assert sorted(number_of.values()) == list(range(n_nodes))


@given(data_sets, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_every_node_says_where_it_was_read(pairs: list[Pair], random: Random) -> None:
    ids = random.sample(range(len(pairs)), random.randint(1, len(pairs)))
    sequences = TokenSequences.from_lists(pairs)
    row = build_row(sequences, np.array(ids))
    at_token = paths_of_tokens(sequences)
    assert [at_token[source] for source in row.node_source] == paths(row)
    owner = np.searchsorted(sequences.offsets, row.node_source, side="right") - 1
    assert set(owner.tolist()) <= set(ids)
    # So nodes of different rows that hold the same context have the same number.
    numbers, n_nodes = number_nodes(sequences)
    _, whole = everything(pairs)
    number_of = dict(zip(paths(whole), numbers[whole.node_source].tolist(), strict=True))
    assert numbers[row.node_source].tolist() == [number_of[path] for path in paths(row)]
    assert len(set(number_of.values())) == n_nodes == len(whole.token_ids)


def test_numbers_and_sources_by_hand() -> None:
    # Sorted contexts: 3 | 7 8 | 7 8 5 | 7 8 5 6, so the nodes are 3, 7, 8, 5, 6.
    pairs = [([7, 8], [5, 6, 9]), ([7, 8], [5]), ([3], [9]), ([7, 8, 5], [9])]
    sequences, row = everything(pairs)
    numbers, n_nodes = number_nodes(sequences)
    assert n_nodes == 5
    assert numbers.tolist() == [1, 2, 3, 4, -1, 1, 2, -1, 0, -1, 1, 2, 3, -1]
    assert row.token_ids.tolist() == [3, 7, 8, 5, 6]
    assert numbers[row.node_source].tolist() == [0, 1, 2, 3, 4]
    assert sequences.tokens[row.node_source].tolist() == [3, 7, 8, 5, 6]


def test_row_by_hand() -> None:
    # 7 8 | 5 6 9    7 8 | 5 9    7 8 5 | 6 9 (trains 6 and 9 only)    3 | 9
    _, row = everything([([7, 8], [5, 6, 9]), ([7, 8], [5, 9]), ([7, 8, 5], [6, 9]), ([3], [9])])
    assert row.token_ids.tolist() == [3, 7, 8, 5, 6]
    assert row.position_ids.tolist() == [0, 0, 1, 2, 3]
    assert row.subtree_end.tolist() == [1, 5, 5, 5, 5]
    triples = zip(row.target_position, row.target_id, row.target_weight, strict=True)
    assert list(triples) == [(0, 9, 1), (2, 5, 2), (3, 6, 2), (3, 9, 1), (4, 9, 2)]
    dtypes = [row.token_ids.dtype, row.position_ids.dtype, row.subtree_end.dtype]
    assert dtypes == [np.int32] * 3
    assert (row.target_position.dtype, row.target_id.dtype) == (np.int64, np.int64)
    assert (row.target_weight.dtype, row.sequence_ids.dtype) == (np.float32, np.int64)
    assert (row.n_sequences, row.n_target_tokens) == (4, 8)


def test_batch_of_one_duplicates_and_one_token_completions() -> None:
    _, one = everything([([4], [2])])
    assert (one.token_ids.tolist(), one.subtree_end.tolist()) == ([4], [1])
    assert (one.target_position.tolist(), one.target_id.tolist()) == ([0], [2])

    sequences, row = everything([([4, 1], [2, 0])] * 3)
    assert row.token_ids.tolist() == [4, 1, 2]
    assert row.target_weight.tolist() == [3, 3]
    twice = build_row(sequences, np.array([2, 2]))
    assert twice.target_weight.tolist() == [2, 2]

    _, forest = everything([([4], [2]), ([5], [2]), ([4], [3])])
    assert forest.token_ids.tolist() == [4, 5]
    assert forest.subtree_end.tolist() == [1, 2]
    assert forest.target_position.tolist() == [0, 0, 1]


def test_token_ids_order_as_numbers_up_to_the_largest_int32() -> None:
    largest = 2**31 - 1
    _, row = everything([([p], [0, 1]) for p in (largest, 256, 255, 65536, 1, 0)])
    assert row.token_ids.tolist() == [0, 0, 1, 0, 255, 0, 256, 0, 65536, 0, largest, 0]
    _, last = everything([([1], [largest])])
    assert last.target_id.tolist() == [largest]


def test_token_sequences_from_lists() -> None:
    sequences = TokenSequences.from_lists([([1, 2], [3]), ([4], [5, 6, 7])])
    assert sequences.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert sequences.offsets.tolist() == [0, 3, 7]
    assert sequences.prompt_lengths.tolist() == [2, 1]
    assert (len(sequences), sequences.length(0), sequences.length(1)) == (2, 3, 4)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([1], [2]), ([], [2])], "sequence 1 has no prompt token"),
        ([([1], [2]), ([1], [2]), ([1], [])], "sequence 2 has no completion token"),
        ([], "no sequences"),
    ],
)
def test_unusable_lists_are_named(pairs: list[Pair], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenSequences.from_lists(pairs)


def arrays(
    offsets: list[int],
    prompts: list[int],
    token_type: type = np.int32,
    offset_type: type = np.int64,
) -> TokenSequences:
    flat = np.zeros(6, dtype=token_type)
    return TokenSequences(flat, np.array(offsets, offset_type), np.array(prompts, np.int32))


def test_arrays_that_do_not_fit_are_refused() -> None:
    assert len(arrays([0, 2, 6], [1, 1])) == 2
    with pytest.raises(DataError, match="sequence 1 has no completion token"):
        arrays([0, 2, 6], [1, 4])
    with pytest.raises(DataError, match="sequence 0 has no prompt token"):
        arrays([0, 2, 6], [0, 1])
    with pytest.raises(DataError, match="sequence 1 has no completion token"):
        arrays([0, 2, 2, 6], [1, 1, 1])
    for offsets, prompts in (([0, 2, 5], [1, 1]), ([1, 2, 6], [1, 1]), ([0, 2, 6], [1])):
        with pytest.raises(ValueError, match="offsets"):
            arrays(offsets, prompts)
    with pytest.raises(ValueError, match="tokens must be one-dimensional int32"):
        arrays([0, 2, 6], [1, 1], token_type=np.int64)
    with pytest.raises(ValueError, match="offsets must be one-dimensional int64"):
        arrays([0, 2, 6], [1, 1], offset_type=np.int32)


def test_bad_ids_and_negative_tokens_are_refused() -> None:
    sequences = TokenSequences.from_lists([([1], [2]), ([3], [4]), ([3], [-4])])
    for ids in ([], [3], [-1, 0]):
        with pytest.raises(ValueError, match=r"0\.\.2"):
            build_row(sequences, np.array(ids, dtype=np.int64))
    assert build_row(sequences, np.array([0, 1])).n_sequences == 2
    with pytest.raises(DataError, match="sequence 2 holds a negative token"):
        build_row(sequences, np.array([0, 2]))


def plan(pairs: list[Pair], order: StepOrder, per_step: int, budget: int, seed=0, epoch=0):
    return plan_steps(
        TokenSequences.from_lists(pairs),
        sequences_per_step=per_step,
        max_tokens_per_row=budget,
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
    assert sorted(i for step in steps for row in step for i in row.tolist()) == [*range(len(pairs))]
    for step in steps:
        assert 1 <= sum(map(len, step)) <= 2 * per_step
        if order == "iid":
            assert abs(sum(map(len, step)) - len(pairs) / len(steps)) < 1
        for row in step:
            nodes = len(build_row(sequences, row).token_ids)
            assert nodes <= budget or len(row) == 1
            assert nodes == len(proper_prefixes([pairs[i] for i in row]))


@given(data_sets, st.sampled_from(ORDERS), st.integers(1, 20), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_plan_keeps_prompts_together_and_rows_full(
    pairs: list[Pair], order: StepOrder, per_step: int, budget: int
) -> None:
    steps = plan(pairs, order, per_step, budget)
    largest = len(pairs) // len(steps)
    for prompt in {tuple(prompt) for prompt, _ in pairs}:
        members = {i for i, pair in enumerate(pairs) if tuple(pair[0]) == prompt}
        touched = [step for step in steps if any(members & set(row.tolist()) for row in step)]
        if order != "iid" and len(members) <= largest:
            assert len(touched) == 1
        for step in touched:
            here = [members & set(row.tolist()) for row in step]
            together = [pairs[i] for i in set().union(*here)]
            if len(proper_prefixes(together)) <= budget:
                assert sum(map(bool, here)) == 1, "a prompt that fits a row is divided"
    for step in steps:
        longest = sum(len(p + c) - 1 for row in step for p, c in (pairs[i] for i in row))
        if longest <= budget:
            assert len(step) == 1


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_rows_are_cut_no_sooner_than_the_budget_asks(sizes: list[int], budget: int) -> None:
    # No prompt begins with another, so the count is exact: a row and the next one's first prompt
    # must exceed the budget together.
    pairs = [([100 + k, 1], [n, 0, n]) for k, size in enumerate(sizes) for n in range(size)]
    assume(max(2 + 2 * size for size in sizes) <= budget)
    for order in ORDERS:
        for step in plan(pairs, order, len(pairs) // 2 + 1, budget):
            for row, following in pairwise(step):
                prompt = pairs[following[0]][0]
                joined = [pairs[i] for i in row]
                joined += [pairs[i] for i in following if pairs[i][0] == prompt]
                assert len(proper_prefixes(joined)) > budget


def test_sequence_longer_than_the_budget_has_its_own_row() -> None:
    pairs = [([1], [2, 3, 4, 5, 6, 7, 8, 0])] * 2 + [([1], [2, 0]), ([1], [3, 0]), ([9], [9, 0])]
    for order in ORDERS:
        (step,) = plan(pairs, order, 5, 5)
        assert [row.tolist() for row in step] == [[2], [0], [1], [3, 4]]


def test_prompt_that_just_fits_is_not_begun_in_the_row_before() -> None:
    # 1 node, then 3 nodes of which 2 would still fit the first row.
    pairs: list[Pair] = [([1], [0]), ([2], [5, 0]), ([2], [6, 0])]
    for order in ORDERS:
        (step,) = plan(pairs, order, 3, 3)
        assert [row.tolist() for row in step] == [[0], [1, 2]]


def many_prompts() -> list[Pair]:
    """53 prompts in pairs of neighbours, 1 to 5 completions each, one of them 20."""
    pairs = []
    for k in range(53):
        for n in range(20 if k == 30 else 1 + k % 5):
            pairs.append(([k // 2, 50 + k], [n, k, 99]))
    return pairs


@pytest.mark.parametrize("order", ORDERS)
def test_plan_is_a_function_of_seed_and_epoch(order: StepOrder) -> None:
    def listed(seed: int, epoch: int) -> list[list[list[int]]]:
        steps = plan(many_prompts(), order, 8, 40, seed=seed, epoch=epoch)
        return [[row.tolist() for row in step] for step in steps]

    def step_sets(seed: int, epoch: int) -> set[frozenset[int]]:
        return {frozenset(i for row in step for i in row) for step in listed(seed, epoch)}

    assert listed(3, 1) == listed(3, 1)
    plans = [listed(3, 1), listed(3, 2), listed(1, 3), listed(4, 1)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])
    # Not only the order of the steps changes but what they hold.
    assert len(set().union(*(step_sets(0, epoch) for epoch in range(4)))) > len(listed(0, 0))


def step_sets(pairs: list[Pair], order: StepOrder, epoch: int) -> list[set[int]]:
    steps = plan(pairs, order, 8, 1000, epoch=epoch)
    return [{i for row in step for i in row.tolist()} for step in steps]


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


def test_neighbours_share_steps_and_prompts_do_not() -> None:
    def nodes(order: StepOrder) -> int:
        pairs = many_prompts()
        steps = plan(pairs, order, 8, 1000, seed=5)
        return sum(len(proper_prefixes([pairs[i] for i in row])) for step in steps for row in step)

    assert nodes("neighbours") < nodes("prompts") < nodes("iid")


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
def test_memory_mapped_tokens_give_the_same_rows(order: StepOrder, tmp_path: Path) -> None:
    held = TokenSequences.from_lists(many_prompts())
    held.tokens.tofile(tmp_path / "tokens.bin")
    mapped_tokens = np.memmap(tmp_path / "tokens.bin", dtype=np.int32, mode="r")
    mapped = TokenSequences(mapped_tokens, held.offsets, held.prompt_lengths)
    assert mapped.tokens is mapped_tokens

    def rows(sequences: TokenSequences) -> list[TreeRow]:
        steps = plan_steps(
            sequences,
            sequences_per_step=8,
            max_tokens_per_row=50,
            order=order,
            seed=1,
            epoch=0,
        )
        return [build_row(sequences, ids) for step in steps for ids in step]

    for a, b in zip(rows(held), rows(mapped), strict=True):
        for name in vars(a):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            assert type(getattr(b, name)) is np.ndarray


def test_planning_reads_long_data_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    n, length = 40, 100_000
    np.tile(np.arange(length, dtype=np.int32), n).tofile(path)
    tokens = np.memmap(path, dtype=np.int32, mode="r+")
    tokens[::length] = np.arange(n) % 7  # the first token tells most of them apart
    offsets = np.arange(n + 1, dtype=np.int64) * length
    sequences = TokenSequences(tokens, offsets, np.full(n, 2, dtype=np.int32))
    tracemalloc.start()
    steps = plan_steps(
        sequences, sequences_per_step=4, max_tokens_per_row=10, order="prompts", seed=0, epoch=0
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
def test_e2e_rows_shrink(shared_dir: Path, order: StepOrder, per_step: int) -> None:
    e2e = tokenised_e2e(shared_dir)
    # A fresh object each time: ranks are cached on it and belong to the time measured.
    sequences = TokenSequences(e2e.tokens, e2e.offsets, e2e.prompt_lengths)
    start = time.perf_counter()
    steps = plan_steps(
        sequences,
        sequences_per_step=per_step,
        max_tokens_per_row=2048,
        order=order,
        seed=0,
        epoch=0,
    )
    planned_s = time.perf_counter() - start
    rows = [build_row(sequences, ids) for step in steps for ids in step]
    built_s = time.perf_counter() - start - planned_s
    nodes = sum(len(row.token_ids) for row in rows)
    total = len(sequences.tokens)
    sizes = [sum(map(len, step)) for step in steps]
    print(
        f"\n{order} {per_step}: {len(steps)} steps of {min(sizes)}-{max(sizes)} sequences, "
        f"{len(rows)} rows, {nodes} of {total} tokens, {total / nodes:.3f}x, "
        f"{sum(len(row.target_id) for row in rows)} targets, "
        f"plan {planned_s:.2f} s, build {built_s:.2f} s"
    )
    assert sum(row.n_target_tokens for row in rows) == int(
        (sequences.lengths - sequences.prompt_lengths).sum()
    )
    assert max(len(row.token_ids) for row in rows) <= 2048
    assert planned_s + built_s < 15
    if order == "iid":
        assert nodes < total
    else:
        assert nodes < total / 1.8
