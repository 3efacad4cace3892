"""Small data sets in which prefixes are shared, and their tries as plain sets."""

from hypothesis import strategies as st

from swlora.data.steps import StepOrder

Pair = tuple[list[int], list[int]]
Weighted = tuple[list[int], list[float]]  # token ids, weight of each
ORDERS: tuple[StepOrder, ...] = ("neighbours", "prompts", "pairs", "iid")

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


@st.composite
def weighted_sequences(draw: st.DrawFn) -> Weighted:
    """Two tokens or more, the first with weight 0, and one with another weight at least."""
    ids = draw(st.lists(tokens, min_size=2, max_size=9))
    some = st.sampled_from((0.0, 0.0, 1.0, 1.0, 0.5, 2.25))
    weights = [0.0, *draw(st.lists(some, min_size=len(ids) - 1, max_size=len(ids) - 1))]
    if not any(weights):
        weights[draw(st.integers(1, len(ids) - 1))] = 1.0
    return ids, weights


weighted_sets = st.lists(weighted_sequences(), min_size=1, max_size=14)


def proper_prefixes(pairs: list[Pair]) -> set[tuple[int, ...]]:
    return {tuple((p + c)[:end]) for p, c in pairs for end in range(1, len(p + c))}


def many_prompts() -> list[Pair]:
    """53 prompts in pairs of neighbours, 1 to 5 completions each, one of them 20."""
    pairs = []
    for k in range(53):
        for n in range(20 if k == 30 else 1 + k % 5):
            pairs.append(([k // 2, 50 + k], [n, k, 99]))
    return pairs
