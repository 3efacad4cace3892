"""What the prefix cache may hold: too small a limit is said, the least recent goes first."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tests.support.models import MakeModel
from tests.support.prefix_runs import Run, assert_same_adapters, make_sequences

from swlora.data.prefix_tree import build_tree, count_nodes
from swlora.data.token_sequences import TokenSequences
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.training.frozen_prefix import GIB, PrefixCache

pytestmark = pytest.mark.usefixtures("fresh_cache")


def test_a_limit_that_is_too_small_is_said(make_model: MakeModel, prefix_folder: Path) -> None:
    sequences = make_sequences()
    run = Run(make_model, sequences, limit_gb=1e-6).epoch().epoch(1)
    (message,) = run.said
    assert message.startswith("no prefix cache: it needs") and "--cache-gb allows 1e-06" in message
    assert run.counts()[0] == 0
    assert not prefix_folder.exists()
    assert_same_adapters(run, Run(make_model, sequences, limit_gb=0.0).epoch().epoch(1))


def size_on_disk(folder: Path) -> int:
    return sum(512 * file.stat().st_blocks for file in folder.iterdir())


def needed_bytes(sequences: TokenSequences) -> int:
    """A state of 24 float32 and a checksum of 4 bytes a node."""
    return count_nodes(sequences) * (24 * 4 + 4)


class Filled(NamedTuple):
    """A cache that holds every state of its data, and its folder."""

    cache: PrefixCache
    folder: Path


def fill(walk: TreeWalk, root: Path, seed: int, used_s: float) -> Filled:
    """Fill the cache of `make_sequences(seed)`, last used at time `used_s`."""
    before = set(root.iterdir()) if root.exists() else set()
    sequences = make_sequences(seed)
    cache = PrefixCache(walk, sequences, limit_gb=1, say=print)
    tree = build_tree(sequences, np.arange(len(sequences)))
    cache(tree, TreeLayout(tree, torch.device("cpu")))
    (folder,) = set(root.iterdir()) - before
    os.utime(folder, (used_s, used_s))
    return Filled(cache, folder)


def test_the_least_recently_used_cache_goes_first(
    make_model: MakeModel, prefix_folder: Path
) -> None:
    walk = TreeWalk(make_model("llama"), 1)
    oldest, newest, middle = (
        fill(walk, prefix_folder, n, t) for n, t in ((1, 100), (2, 300), (3, 200))
    )
    for filled in (oldest, newest, middle):
        filled.cache.close()
    others = [filled.folder for filled in (oldest, newest, middle)]
    sequences = make_sequences(4)

    def open_with_room_for(n_bytes: int) -> set[Path]:
        limit_gb = (needed_bytes(sequences) + n_bytes) / GIB
        PrefixCache(walk, sequences, limit_gb=limit_gb, say=print).close()
        return {folder for folder in others if folder.exists()}

    total = sum(size_on_disk(folder) for folder in others)
    assert open_with_room_for(total) == set(others)
    assert open_with_room_for(total - 1) == {newest.folder, middle.folder}
    assert open_with_room_for(size_on_disk(newest.folder)) == {newest.folder}
    assert open_with_room_for(0) == set()


def test_a_cache_in_use_is_not_evicted(make_model: MakeModel, prefix_folder: Path) -> None:
    walk = TreeWalk(make_model("llama"), 1)
    used, unused = (fill(walk, prefix_folder, n, t) for n, t in ((1, 100), (2, 300)))
    unused.cache.close()
    sequences = make_sequences(4)
    limit_gb = needed_bytes(sequences) / GIB
    PrefixCache(walk, sequences, limit_gb=limit_gb, say=print).close()
    assert used.folder.exists() and not unused.folder.exists()
    tree = build_tree(make_sequences(1), np.arange(3))
    layout = TreeLayout(tree, torch.device("cpu"))
    torch.testing.assert_close(used.cache(tree, layout), walk.prefix(layout))
    assert used.cache.n_read_trees == 1
    used.cache.close()
    PrefixCache(walk, sequences, limit_gb=limit_gb, say=print).close()
    assert not used.folder.exists()


def test_using_a_cache_makes_it_recent(make_model: MakeModel, prefix_folder: Path) -> None:
    walk = TreeWalk(make_model("llama"), 1)
    again, other = (fill(walk, prefix_folder, n, t) for n, t in ((1, 100), (2, 300)))
    again.cache.close()
    other.cache.close()
    PrefixCache(walk, make_sequences(1), limit_gb=1, say=print).close()
    sequences = make_sequences(4)
    limit_gb = (needed_bytes(sequences) + size_on_disk(again.folder)) / GIB
    PrefixCache(walk, sequences, limit_gb=limit_gb, say=print).close()
    assert again.folder.exists() and not other.folder.exists()
