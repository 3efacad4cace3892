"""The ring of the slot cache against lists that simply grow."""

import random

import pytest
import torch
from torch import Tensor

from swlora.decoding.slot_cache import SlotCache

N_LAYERS, N_HEADS, WIDTH = 2, 3, 4


def tokens(rng: random.Random, n: int) -> Tensor:
    """Keys and values of n tokens, (layers, 2, heads, n, width)."""
    generator = torch.Generator().manual_seed(rng.randrange(2**30))
    return torch.randn(N_LAYERS, 2, N_HEADS, n, WIDTH, generator=generator)


def step(cache: SlotCache, new: Tensor, window: int | None) -> list[Tensor]:
    """Give each slot its token of `new` (layers, 2, slots, heads, width); return what each sees."""
    layout = cache.advance()
    seen: list[list[Tensor]] = [[] for _ in range(cache.n_slots)]
    visible = layout.visible(window)
    for layer in range(N_LAYERS):
        keys, values = cache.update(*new[layer, :, :, :, None], layer)
        for slot in range(cache.n_slots):
            seen[slot] += [keys[slot][:, visible[slot]], values[slot][:, visible[slot]]]
    return [torch.stack(parts) for parts in seen]


def as_set(states: Tensor) -> set[tuple[float, ...]]:
    """The columns of (parts, heads, n, width), whatever their order."""
    columns = states.permute(2, 0, 1, 3).reshape(states.shape[2], -1)
    return {tuple(column.tolist()) for column in columns}


@pytest.mark.parametrize("seed", range(4))
def test_texts_see_all_their_tokens_and_no_others(seed: int) -> None:
    rng = random.Random(seed)
    cache, expected = SlotCache(N_LAYERS, 9), list[Tensor]()
    for _ in range(120):
        if len(expected) < 9 and rng.random() < 0.2:
            texts = [tokens(rng, rng.choice((1, 3, 30, 150))) for _ in range(rng.randrange(1, 3))]
            texts = texts[: 9 - len(expected)]
            cache.add(texts)
            expected += texts
        if expected and rng.random() < 0.1:
            gone = rng.randrange(len(expected))
            cache.remove(gone)
            expected[gone] = expected[-1]
            expected.pop()
        if not expected:
            assert cache.n_bytes == 0
            continue
        new = tokens(rng, len(expected)).transpose(2, 3)  # (layers, 2, slots, heads, width)
        expected = [
            torch.cat([text, new[:, :, i, :, None]], dim=3) for i, text in enumerate(expected)
        ]
        window = rng.choice((None, 1, 20))
        for text, seen in zip(expected, step(cache, new, window), strict=True):
            wanted = text.flatten(0, 1)[:, :, -(window or 10_000) :]
            assert seen.shape[2] == wanted.shape[2]
            assert as_set(seen) == as_set(wanted)
    longest, bytes_a_column = max(text.shape[3] for text in expected), 2 * 2 * 3 * 4 * 4
    assert cache.lengths == [text.shape[3] for text in expected]
    assert cache.n_bytes <= 9 * bytes_a_column * 2 * (longest + max(32, longest // 8))


def test_what_a_text_leaves_behind_is_gone() -> None:
    """0 * nan is nan: a hidden column must be a number."""
    rng = random.Random(0)
    cache = SlotCache(N_LAYERS, 2)
    cache.add([tokens(rng, 5), torch.full_like(tokens(rng, 20), torch.nan)])
    cache.remove(1)
    cache.add([tokens(rng, 3)])
    cache.advance()
    keys, values = cache.update(*tokens(rng, 2).transpose(2, 3)[0, :, :, :, None], 0)
    assert bool(torch.isfinite(keys).all() and torch.isfinite(values).all())
