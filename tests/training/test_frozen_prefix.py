"""The cache of states below the lowest adapted block: same results, and no way to break a run."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from swlora.adapters.methods import attach, train_mode, trainable_parameters
from swlora.config import AdapterSpec, TrainSpec
from swlora.data.prefix_tree import build_tree, count_nodes
from swlora.data.steps import plan_steps
from swlora.data.token_sequences import TokenSequences
from swlora.kernels.split_model import SplitModel
from swlora.kernels.tree_attention import TreeLayout
from swlora.training.frozen_prefix import GIB, PrefixCache, content_key
from swlora.training.step import TreeStep, make_step

MakeModel = Callable[..., Any]
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def root(own_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the caches of this test alone."""
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


def make_sequences(seed: int = 0) -> TokenSequences:
    """Ten prompts with one to four completions that begin alike."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(10):
        prompt = [number + 1, *rng.integers(1, 200, rng.integers(1, 9)).tolist()]
        trunk = rng.integers(1, 200, 9).tolist()
        for end in range(1 + number % 4):
            pairs.append((prompt, [*trunk[: 2 * end], 201 + end, 0]))
    return TokenSequences.from_lists(pairs)


def adapted(make_model: MakeModel) -> Any:
    spec = AdapterSpec(targets=["all-linear"], rank=2, alpha=4)
    model = make_model("llama")
    peft_model = attach(model, spec, [1, 2], seed=1)
    train_mode(peft_model)
    return peft_model


def steps_of(sequences: TokenSequences, epoch: int) -> list[list[np.ndarray]]:
    return plan_steps(
        sequences,
        sequences_per_step=6,
        max_tokens_per_row=30,
        order="prompts",
        seed=0,
        epoch=epoch,
    )


class Run:
    """A training run with or without the cache, `limit_gb` 0, and what it said."""

    def __init__(
        self, make_model: MakeModel, sequences: TokenSequences, *, limit_gb: float = 1.0
    ) -> None:
        self.peft_model = adapted(make_model)
        self.said: list[str] = []
        self.sequences, self.losses = sequences, []
        spec = TrainSpec(cache_gb=limit_gb)
        self.step = make_step(self.peft_model, sequences, spec, self.said.append)
        self.parameters = trainable_parameters(self.peft_model)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=5e-3)

    @property
    def cache(self) -> PrefixCache:
        assert isinstance(self.step, TreeStep)
        assert isinstance(self.step.prefix_source, PrefixCache)
        return self.step.prefix_source

    def epoch(self, number: int = 0) -> "Run":
        for rows in steps_of(self.sequences, number):
            loss = self.step(rows)
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad /= loss.n_tokens
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.nats_per_token)
        return self

    def close(self) -> "Run":
        self.cache.close()
        return self

    def counts(self) -> tuple[int, int]:
        """Rows read and rows computed."""
        return self.cache.n_read_rows, self.cache.n_computed_rows


def n_rows(sequences: TokenSequences) -> int:
    return sum(len(rows) for rows in steps_of(sequences, 0))


def assert_same_adapters(a: Run, b: Run) -> None:
    assert a.losses == b.losses
    for name, parameter in a.parameters.items():
        assert torch.equal(parameter, b.parameters[name]), name


def test_bit_identical_after_an_epoch_and_read_from_the_second_on(make_model: MakeModel) -> None:
    sequences = make_sequences()
    plain = Run(make_model, sequences, limit_gb=0.0).epoch()
    cached = Run(make_model, sequences).epoch()
    assert_same_adapters(plain, cached)
    assert cached.counts() == (0, n_rows(sequences)) and n_rows(sequences) >= 5
    for number in (1, 2):  # rows are cut anew: same states, read from other rows' computation
        plain.epoch(number)
        cached.epoch(number)
    assert cached.counts() == (
        sum(len(r) for e in (1, 2) for r in steps_of(sequences, e)),
        n_rows(sequences),
    )
    np.testing.assert_allclose(cached.losses, plain.losses, rtol=1e-6)
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(cached.parameters[name], parameter, rtol=1e-4, atol=1e-6)
    assert plain.losses[-1] < plain.losses[0]
    assert not cached.said


def test_a_second_run_reads_everything(make_model: MakeModel) -> None:
    sequences = make_sequences()
    first = Run(make_model, sequences).epoch().close()
    second = Run(make_model, sequences)
    assert second.said == ["prefix cache: 100% of the states are there from an earlier run"]
    second.epoch()
    assert second.counts() == (n_rows(sequences), 0)
    assert_same_adapters(first, second)


def test_a_run_that_was_cut_short_leaves_what_it_computed(make_model: MakeModel) -> None:
    sequences = make_sequences()
    first = Run(make_model, sequences)
    first.step(steps_of(sequences, 0)[0])
    n_first = first.close().counts()[1]
    second = Run(make_model, sequences)
    assert len(second.said) == 1 and "100%" not in second.said[0]
    second.epoch()
    assert second.counts() == (n_first, n_rows(sequences) - n_first)
    assert_same_adapters(second, Run(make_model, sequences, limit_gb=0.0).epoch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "opt"])
def test_states_come_back_as_they_were(
    make_model: MakeModel, model_type: str, dtype: torch.dtype
) -> None:
    split, sequences = SplitModel(make_model(model_type).to(dtype), 2), make_sequences()
    cache = PrefixCache(split, sequences, limit_gb=1, say=print)
    bounds = pairwise((0, 6, 13, 21))  # between prompts: what two rows share, the later one writes
    rows = [build_tree(sequences, np.arange(*bound)) for bound in bounds]
    layouts = [TreeLayout(row, torch.device("cpu")) for row in rows]
    computed = [cache(row, layout) for row, layout in zip(rows, layouts, strict=True)]
    assert cache.n_computed_rows == 3
    for row, layout, states in zip(rows, layouts, computed, strict=True):
        assert torch.equal(states, split.prefix(layout))
        read = cache(row, layout)
        assert read.dtype == dtype and torch.equal(read, states) and not read.requires_grad
    assert (cache.n_read_rows, cache.n_computed_rows) == (3, 3)
    # A row of nodes that were computed in several rows, and one with a node that was not.
    mixed = build_tree(sequences, np.array([1, 6, 11]))
    states = cache(mixed, TreeLayout(mixed, torch.device("cpu")))
    expected = split.prefix(TreeLayout(mixed, torch.device("cpu")))
    assert cache.n_read_rows == 4
    torch.testing.assert_close(
        states, expected, rtol=1e-2, atol=1e-2 if dtype != torch.float32 else 1e-5
    )
    partly = build_tree(sequences, np.array([1, 22]))
    cache(partly, TreeLayout(partly, torch.device("cpu")))
    assert cache.n_computed_rows == 4
    cache.close()


def key(model: Any, sequences: TokenSequences, cut: int = 1) -> str:
    return content_key(SplitModel(model, cut), sequences)


def test_the_key_depends_on_all_that_the_states_depend_on(make_model: MakeModel) -> None:
    sequences = make_sequences()
    model = make_model("llama")
    own = key(model, sequences)
    assert own == key(make_model("llama"), make_sequences())
    assert len({own, key(model, sequences, 2), key(model, make_sequences(1))}) == 3
    others = [
        make_model("llama", seed=1),
        make_model("llama").to(torch.bfloat16),
        make_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e4}),
        make_model("llama", rms_norm_eps=1e-3),
    ]
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        others.append(make_model("llama"))
        others[-1].get_parameter(name).view(-1)[7] += 1e-6
    assert len({own, *(key(other, sequences) for other in others)}) == 1 + len(others)
    shorter = TokenSequences(
        sequences.tokens,
        np.append(sequences.offsets[:-2], sequences.offsets[-1]),
        sequences.prompt_lengths[:-1],
    )
    assert key(model, shorter) != own


def test_the_key_depends_on_nothing_else(make_model: MakeModel) -> None:
    sequences = make_sequences()
    own = key(make_model("llama"), sequences)
    above = make_model("llama")
    above.get_parameter("model.layers.1.mlp.up_proj.weight").zero_()
    assert key(above, sequences) == own
    peft_model = adapted(make_model)
    for parameter in trainable_parameters(peft_model).values():
        torch.nn.init.normal_(parameter)
    assert key(peft_model.get_base_model(), sequences) == own
    longer_prompts = TokenSequences(
        sequences.tokens, sequences.offsets, (sequences.lengths - 1).astype(np.int32)
    )
    assert key(make_model("llama"), longer_prompts) == own


def only_folder(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["n_nodes", "row_bytes", "format", "not json", "gone"])
def test_a_damaged_header_has_the_cache_built_anew(
    make_model: MakeModel, root: Path, damage: str
) -> None:
    sequences = make_sequences()
    Run(make_model, sequences).epoch().close()
    header = only_folder(root) / "header.json"
    whole = json.loads(header.read_text())
    if damage == "gone":
        header.unlink()
    elif damage == "not json":
        header.write_text("{")
    else:
        header.write_text(json.dumps(whole | {damage: whole[damage] + 1}))
    (only_folder(root) / "states").write_bytes(b"\x01" * 50_000)
    again = Run(make_model, sequences).epoch().close()
    assert again.counts() == (0, n_rows(sequences)) and not again.said
    assert json.loads(header.read_text()) == whole
    reference = Run(make_model, sequences, limit_gb=0.0).epoch()
    assert_same_adapters(again, reference)
    third = Run(make_model, sequences).epoch()
    assert third.counts() == (n_rows(sequences), 0)
    assert_same_adapters(third, reference)


@pytest.mark.faults
@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("n_steps", [1, None])
def test_what_a_truncated_file_lost_is_computed_again(
    make_model: MakeModel, root: Path, left: float, n_steps: int | None
) -> None:
    sequences = make_sequences()
    first = Run(make_model, sequences)
    for rows in steps_of(sequences, 0)[:n_steps]:
        first.step(rows)
    first.close()
    states = only_folder(root) / "states"
    os.truncate(states, int(states.stat().st_size * left))
    # Epoch 1 first: it writes behind the end of the file, and so fills it up with zeros.
    plain = Run(make_model, sequences, limit_gb=0.0).epoch(1).epoch(0)
    for _ in range(2):
        run = Run(make_model, sequences).epoch(1).epoch(0).close()
        np.testing.assert_allclose(run.losses, plain.losses, rtol=1e-6)
    assert run.counts() == (2 * n_rows(sequences), 0)


@pytest.mark.faults
def test_a_file_that_is_cut_during_a_run_ends_the_cache_and_not_the_run(
    make_model: MakeModel, root: Path
) -> None:
    sequences = make_sequences()
    run, plain = Run(make_model, sequences), Run(make_model, sequences, limit_gb=0.0)
    run.epoch()
    os.truncate(only_folder(root) / "states", 10)
    run.epoch(1)
    assert run.said == [
        "going on without the prefix cache: the prefix cache is shorter than its header says"
    ]
    assert_same_adapters(run, plain.epoch().epoch(1))


def test_a_limit_that_is_too_small_is_said(make_model: MakeModel, root: Path) -> None:
    sequences = make_sequences()
    run = Run(make_model, sequences, limit_gb=1e-6).epoch().epoch(1)
    (message,) = run.said
    assert message.startswith("no prefix cache: it needs") and "--cache-gb allows 1e-06" in message
    assert run.counts()[0] == 0
    assert not root.exists()
    assert_same_adapters(run, Run(make_model, sequences, limit_gb=0.0).epoch().epoch(1))


@contextmanager
def full_disk_after(n_writes: int) -> Iterator[None]:
    """Let n_writes writes succeed, and none after them, while the body runs."""
    write, done = os.pwrite, []

    def limited(*args: Any) -> int:
        if len(done) == n_writes:
            raise NO_SPACE
        done.append(args)
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        yield


@pytest.mark.faults
@pytest.mark.parametrize("n_writes", [0, 1, 7])
def test_a_disk_that_fills_up_ends_the_cache_and_not_the_run(
    make_model: MakeModel, n_writes: int
) -> None:
    sequences = make_sequences()
    run = Run(make_model, sequences)
    with full_disk_after(n_writes):
        run.epoch().epoch(1)
    assert run.said == ["going on without the prefix cache: No space left on device"]
    plain = Run(make_model, sequences, limit_gb=0.0).epoch().epoch(1)
    assert_same_adapters(run, plain)
    later = Run(make_model, sequences).epoch().epoch(1)  # half-written states are not believed
    np.testing.assert_allclose(later.losses, plain.losses, rtol=1e-6)


@pytest.mark.faults
@pytest.mark.parametrize("n_writes", range(4))
def test_states_are_there_before_they_are_said_to_be(make_model: MakeModel, n_writes: int) -> None:
    # The last prompts lie at the end of the file: what the first ones lack is a hole of zeros.
    split, sequences = SplitModel(make_model("llama"), 1), make_sequences()
    row = build_tree(sequences, np.array([0, 6]))
    layout = TreeLayout(row, torch.device("cpu"))
    last = build_tree(sequences, np.array([22]))
    cache = PrefixCache(split, sequences, limit_gb=1, say=print)
    cache(last, TreeLayout(last, torch.device("cpu")))
    with full_disk_after(n_writes):
        torch.testing.assert_close(cache(row, layout), split.prefix(layout))
    later = PrefixCache(split, sequences, limit_gb=1, say=print)
    for ids in ([0], [6], [0, 6]):
        part = build_tree(sequences, np.array(ids))
        layout = TreeLayout(part, torch.device("cpu"))
        torch.testing.assert_close(later(part, layout), split.prefix(layout))
    later.close()


@pytest.mark.faults
@pytest.mark.parametrize("name", ["header.json", "lock", "states", "present"])
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


def test_a_cache_folder_that_cannot_be_made(make_model: MakeModel, root: Path) -> None:
    root.parent.write_text("a file where the folder should be")
    run = Run(make_model, make_sequences()).epoch()
    (message,) = run.said
    assert message.startswith("going on without the prefix cache: ")


def test_two_runs_over_the_same_content_share_their_states(make_model: MakeModel) -> None:
    sequences = make_sequences()
    split = SplitModel(make_model("llama"), 1)
    first = PrefixCache(split, sequences, limit_gb=1, say=print)
    second = PrefixCache(split, sequences, limit_gb=1, say=print)
    bounds = list(pairwise((0, 1, 3, 6, 10, 11, 13, 16, 20, 21, 23)))
    assert bounds[-1][1] == len(sequences)
    rows = [build_tree(sequences, np.arange(*bound)) for bound in bounds]
    layouts = [TreeLayout(row, torch.device("cpu")) for row in rows]
    for number, (row, layout) in enumerate(zip(rows, layouts, strict=True)):
        cache = (first, second)[number % 2]
        assert torch.equal(cache(row, layout), split.prefix(layout))
    for number, (row, layout) in enumerate(zip(rows, layouts, strict=True)):
        cache = (second, first)[number % 2]  # what the other one wrote
        assert torch.equal(cache(row, layout), split.prefix(layout))
    first.close()
    second.close()
    third = PrefixCache(split, sequences, limit_gb=1, say=print)
    for row, layout in zip(rows, layouts, strict=True):
        assert torch.equal(third(row, layout), split.prefix(layout))
    assert (third.n_read_rows, third.n_computed_rows) == (len(rows), 0)
    third.close()


def size_on_disk(folder: Path) -> int:
    return sum(512 * file.stat().st_blocks for file in folder.iterdir())


def needed_bytes(sequences: TokenSequences) -> int:
    """A state of 24 float32 and a flag a node."""
    return count_nodes(sequences) * (24 * 4 + 1)


class Filled(NamedTuple):
    """A cache that holds every state of its data, and its folder."""

    cache: PrefixCache
    folder: Path


def fill(split: SplitModel, root: Path, seed: int, used_s: float) -> Filled:
    """Fill the cache of `make_sequences(seed)`, last used at time `used_s`."""
    before = set(root.iterdir()) if root.exists() else set()
    sequences = make_sequences(seed)
    cache = PrefixCache(split, sequences, limit_gb=1, say=print)
    row = build_tree(sequences, np.arange(len(sequences)))
    cache(row, TreeLayout(row, torch.device("cpu")))
    (folder,) = set(root.iterdir()) - before
    os.utime(folder, (used_s, used_s))
    return Filled(cache, folder)


def test_the_least_recently_used_cache_goes_first(make_model: MakeModel, root: Path) -> None:
    split = SplitModel(make_model("llama"), 1)
    oldest, newest, middle = (fill(split, root, n, t) for n, t in ((1, 100), (2, 300), (3, 200)))
    for filled in (oldest, newest, middle):
        filled.cache.close()
    others = [filled.folder for filled in (oldest, newest, middle)]
    sequences = make_sequences(4)

    def open_with_room_for(n_bytes: int) -> set[Path]:
        limit_gb = (needed_bytes(sequences) + n_bytes) / GIB
        PrefixCache(split, sequences, limit_gb=limit_gb, say=print).close()
        return {folder for folder in others if folder.exists()}

    total = sum(size_on_disk(folder) for folder in others)
    assert open_with_room_for(total) == set(others)
    assert open_with_room_for(total - 1) == {newest.folder, middle.folder}
    assert open_with_room_for(size_on_disk(newest.folder)) == {newest.folder}
    assert open_with_room_for(0) == set()


def test_a_cache_in_use_is_not_evicted(make_model: MakeModel, root: Path) -> None:
    split = SplitModel(make_model("llama"), 1)
    used, unused = (fill(split, root, n, t) for n, t in ((1, 100), (2, 300)))
    unused.cache.close()
    sequences = make_sequences(4)
    limit_gb = needed_bytes(sequences) / GIB
    PrefixCache(split, sequences, limit_gb=limit_gb, say=print).close()
    assert used.folder.exists() and not unused.folder.exists()
    row = build_tree(make_sequences(1), np.arange(3))
    layout = TreeLayout(row, torch.device("cpu"))
    torch.testing.assert_close(used.cache(row, layout), split.prefix(layout))
    assert used.cache.n_read_rows == 1
    used.cache.close()
    PrefixCache(split, sequences, limit_gb=limit_gb, say=print).close()
    assert not used.folder.exists()


def test_using_a_cache_makes_it_recent(make_model: MakeModel, root: Path) -> None:
    split = SplitModel(make_model("llama"), 1)
    again, other = (fill(split, root, n, t) for n, t in ((1, 100), (2, 300)))
    again.cache.close()
    other.cache.close()
    PrefixCache(split, make_sequences(1), limit_gb=1, say=print).close()
    sequences = make_sequences(4)
    limit_gb = (needed_bytes(sequences) + size_on_disk(again.folder)) / GIB
    PrefixCache(split, sequences, limit_gb=limit_gb, say=print).close()
    assert again.folder.exists() and not other.folder.exists()
