"""Tokenised data that branch as real data do, long enough for several chunks of a tree."""

import numpy as np

Pair = tuple[list[int], list[int]]  # prompt, completion

N_TOKENS = 200


def branching() -> list[Pair]:
    """Short and alike: shared prefixes, duplicates, nested prompts, one-token completions."""
    rng = np.random.default_rng(3)
    pairs: list[Pair] = []
    for _ in range(6):
        prompt = rng.integers(5, 25, rng.integers(2, 9)).tolist()
        for _ in range(rng.integers(1, 5)):
            pairs.append((prompt, [*rng.integers(1, 4, rng.integers(0, 12)).tolist(), 0]))
    prompt, completion = pairs[0]
    pairs += [pairs[0], pairs[0], (prompt + completion[:1], [3, 0]), (prompt, [0]), (prompt, [7])]
    return pairs


def deep() -> list[Pair]:
    """Prompts cut from one stem, completions cut from a trunk of theirs: many runs of a row."""
    rng = np.random.default_rng(4)
    stem = rng.integers(1, N_TOKENS, 90).tolist()
    pairs: list[Pair] = []
    for _ in range(7):
        prompt = stem[: int(rng.integers(20, 90))] + rng.integers(1, N_TOKENS, 3).tolist()
        trunk = rng.integers(1, N_TOKENS, 70).tolist()
        for _ in range(3):
            tail = rng.integers(1, N_TOKENS, int(rng.integers(0, 20))).tolist()
            pairs.append((prompt, [*trunk[: int(rng.integers(0, 70))], *tail, 0]))
    pairs.append((stem, [5]))
    pairs.append((stem[:40], [*stem[40:85], 9]))  # a prompt inside the stem, trained along it
    return pairs


def chain() -> list[Pair]:
    """Twigs off one trunk, every prompt beginning with the one before: ancestors in every run."""
    rng = np.random.default_rng(5)
    trunk = rng.integers(1, N_TOKENS, 200).tolist()
    return [
        (trunk[:n], trunk[n : n + 17] + rng.integers(1, N_TOKENS, 7).tolist())
        for n in range(2, 180, 11)
    ]
