"""The prefix cache on damaged files and full disks: it is built anew or ends, the run goes on."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models import MakeModel
from tests.support.prefix_runs import (
    NO_SPACE,
    Run,
    assert_same_adapters,
    full_disk_after,
    make_sequences,
    n_trees,
    only_folder,
    steps_of,
)

from swlora.caches import LOCK, PREFIX, remove
from swlora.data.prefix_tree import build_tree
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.training.frozen_prefix import PrefixCache, content_key

pytestmark = pytest.mark.usefixtures("fresh_cache", "small_fixed_groups")


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["n_nodes", "row_bytes", "format", "not json", "gone"])
def test_a_damaged_header_has_the_cache_built_anew(
    make_model: MakeModel, prefix_folder: Path, damage: str
) -> None:
    sequences = make_sequences()
    first = Run(make_model, sequences).epoch().close()
    header = only_folder(prefix_folder) / "header.json"
    whole = json.loads(header.read_text())
    if damage == "gone":
        header.unlink()
    elif damage == "not json":
        header.write_text("{")
    else:
        header.write_text(json.dumps(whole | {damage: whole[damage] + 1}))
    (only_folder(prefix_folder) / "states").write_bytes(b"\x01" * 50_000)
    again = Run(make_model, sequences).epoch().close()
    assert again.counts() == first.counts() and not again.said
    assert json.loads(header.read_text()) == whole
    assert_same_adapters(again, first)
    third = Run(make_model, sequences).epoch()
    assert third.counts() == (n_trees(sequences), 0)
    assert_same_adapters(third, first)


@pytest.mark.faults
@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("n_steps", [1, None])
def test_what_a_truncated_file_lost_is_computed_again(
    make_model: MakeModel, prefix_folder: Path, left: float, n_steps: int | None
) -> None:
    sequences = make_sequences()
    first = Run(make_model, sequences)
    for groups in steps_of(sequences, 0)[:n_steps]:
        first.step(groups)
    first.close()
    states = only_folder(prefix_folder) / "states"
    os.truncate(states, int(states.stat().st_size * left))
    # Epoch 1 first: it writes behind the end of the file, and so fills it up with zeros.
    runs = [Run(make_model, sequences).epoch(1).epoch(0).close() for _ in range(2)]
    assert runs[1].counts() == (n_trees(sequences, 0, 1), 0)
    shutil.rmtree(prefix_folder)
    cold = Run(make_model, sequences).epoch(1).epoch(0).close()
    for run in runs:
        assert_same_adapters(run, cold)


@pytest.mark.faults
@pytest.mark.parametrize("file", ["states", "checksums"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_bit_is_noticed_and_the_states_are_computed_again(
    make_model: MakeModel, prefix_folder: Path, file: str, place: float
) -> None:
    sequences = make_sequences()
    first = Run(make_model, sequences).epoch().close()
    path = only_folder(prefix_folder) / file
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)
    run = Run(make_model, sequences).epoch().close()
    share, said = run.said
    assert share.startswith("prefix cache: 100%") and said.endswith("they are computed again")
    assert run.counts() == (n_trees(sequences), 1)
    assert_same_adapters(run, first)
    later = Run(make_model, sequences).epoch().close()
    assert later.counts() == (n_trees(sequences), 0) and len(later.said) == 1


@pytest.mark.faults
def test_a_half_that_was_lost_to_zeros_is_noticed(
    make_model: MakeModel, prefix_folder: Path
) -> None:
    sequences = make_sequences()
    first = Run(make_model, sequences).epoch().close()
    path = only_folder(prefix_folder) / "states"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    run = Run(make_model, sequences).epoch().close()
    assert "damaged" in run.said[-1]
    assert_same_adapters(run, first)


@pytest.mark.faults
def test_a_file_that_is_cut_during_a_run_ends_the_cache_and_not_the_run(
    make_model: MakeModel, prefix_folder: Path
) -> None:
    sequences = make_sequences()
    run, closed = Run(make_model, sequences).epoch(), Run(make_model, sequences).epoch()
    os.truncate(only_folder(prefix_folder) / "states", 10)
    run.epoch(1)
    assert run.said == [
        "going on without the prefix cache: the prefix cache is shorter than its header says"
    ]
    assert_same_adapters(run, closed.close().epoch(1))  # from there on as without a cache


@pytest.mark.faults
@pytest.mark.parametrize("n_writes", [0, 1, 7])
def test_a_disk_that_fills_up_ends_the_cache_and_not_the_run(
    make_model: MakeModel, prefix_folder: Path, n_writes: int
) -> None:
    sequences = make_sequences()
    run = Run(make_model, sequences)
    with full_disk_after(n_writes):
        run.epoch().epoch(1)
    assert run.said == ["going on without the prefix cache: No space left on device"]
    plain = Run(make_model, sequences, limit_gb=0.0).epoch().epoch(1)
    np.testing.assert_allclose(run.losses, plain.losses, rtol=1e-6)
    if n_writes < 2:  # no state was ever there
        assert_same_adapters(run, plain)
    later = Run(make_model, sequences).epoch().epoch(1)  # half-written states are not believed
    shutil.rmtree(prefix_folder)
    assert_same_adapters(later, Run(make_model, sequences).epoch().epoch(1))


@pytest.mark.faults
@pytest.mark.parametrize("n_writes", range(4))
def test_states_are_there_before_they_are_said_to_be(make_model: MakeModel, n_writes: int) -> None:
    # The last prompts lie at the end of the file: what the first ones lack is a hole of zeros.
    walk, sequences = TreeWalk(make_model("llama"), 1), make_sequences()
    tree = build_tree(sequences, np.array([0, 6]))
    layout = TreeLayout(tree, torch.device("cpu"))
    last = build_tree(sequences, np.array([22]))
    cache = PrefixCache(walk, sequences, limit_gb=1, say=print)
    cache(last, TreeLayout(last, torch.device("cpu")))
    with full_disk_after(n_writes):
        torch.testing.assert_close(cache(tree, layout), walk.prefix(layout))
    later = PrefixCache(walk, sequences, limit_gb=1, say=print)
    for ids in ([0], [6], [0, 6]):
        part = build_tree(sequences, np.array(ids))
        layout = TreeLayout(part, torch.device("cpu"))
        torch.testing.assert_close(later(part, layout), walk.prefix(layout))
    later.close()


@pytest.mark.faults
@pytest.mark.parametrize("name", ["header.json", "lock", "states", "checksums"])
def test_a_disk_that_is_full_from_the_start(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sequences = make_sequences()
    open_file, sync = os.open, os.fsync

    def no_new_file(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == name and flags & os.O_CREAT:
            raise NO_SPACE
        return open_file(path, flags, *args, **kwargs)

    def no_sync(descriptor: int) -> None:
        if name == "header.json":
            raise NO_SPACE
        sync(descriptor)

    monkeypatch.setattr(os, "open", no_new_file)
    monkeypatch.setattr(os, "fsync", no_sync)
    run = Run(make_model, sequences).epoch()
    (message,) = run.said
    assert message.startswith("going on without the prefix cache: ")
    assert message.endswith("No space left on device")
    assert_same_adapters(run, Run(make_model, sequences, limit_gb=0.0).epoch())


@pytest.mark.faults
@pytest.mark.parametrize("name", ["header.json", "states", "checksums"])
def test_a_cache_that_could_not_be_opened_is_not_in_use(
    make_model: MakeModel, prefix_folder: Path, name: str
) -> None:
    walk, sequences = TreeWalk(make_model("llama"), 1), make_sequences()
    said: list[str] = []
    folder = prefix_folder / content_key(walk, sequences)
    (folder / name).mkdir(parents=True)  # a folder is in the way of the file
    PrefixCache(walk, sequences, limit_gb=1, say=said.append)
    (message,) = said
    assert message.startswith("going on without the prefix cache: ")
    assert (folder / LOCK).exists()
    assert remove(PREFIX, folder)


def test_a_cache_folder_that_cannot_be_made(make_model: MakeModel, prefix_folder: Path) -> None:
    prefix_folder.parent.write_text("a file where the folder should be")
    run = Run(make_model, make_sequences()).epoch()
    (message,) = run.said
    assert message.startswith("going on without the prefix cache: ")
