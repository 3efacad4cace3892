"""A training comes to the same bits whatever the prefix cache held when it began."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models import MakeModel
from tests.support.prefix_runs import (
    Run,
    assert_same_adapters,
    make_sequences,
    n_trees,
    only_folder,
    steps_of,
)

from swlora.config import ModelSpec
from swlora.data.prefix_tree import build_tree
from swlora.data.steps import StepOrder
from swlora.data.token_sequences import TokenSequences
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.models.load import load_model
from swlora.training.frozen_prefix import PrefixCache

pytestmark = pytest.mark.usefixtures("fresh_cache", "small_fixed_groups")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FAMILIES = ("gpt2", "llama", "gemma2", "opt", "gpt_neox", "olmo2")
Left = Callable[[MakeModel, TokenSequences, dict[str, Any]], object]


def _whole(make_model: MakeModel, sequences: TokenSequences, how: dict[str, Any]) -> None:
    Run(make_model, sequences, **how).epoch(3).epoch(1).close()


def _one_step(make_model: MakeModel, sequences: TokenSequences, how: dict[str, Any]) -> None:
    run = Run(make_model, sequences, **how)
    run.step(steps_of(sequences, 2)[0])
    run.close()


def _single_sequences(
    make_model: MakeModel, sequences: TokenSequences, how: dict[str, Any]
) -> None:
    run = Run(make_model, sequences, **how)
    for i in (22, 3, 11):
        run.step([np.array([i])])
    run.close()


def _other_data(make_model: MakeModel, _sequences: TokenSequences, how: dict[str, Any]) -> None:
    Run(make_model, make_sequences(7), **how).epoch().close()


LEFT: dict[str, Left] = {
    "all": _whole,
    "a step": _one_step,
    "single sequences": _single_sequences,
    "other data": _other_data,
}


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_cold_warm_and_half_warm_are_the_same_bits(
    make_model: MakeModel, fresh_cache: Path, family: str, dtype: torch.dtype
) -> None:
    sequences, how = make_sequences(), {"family": family, "dtype": dtype}
    cold = Run(make_model, sequences, **how).epoch().epoch(1).close()
    assert cold.cache.n_computed_groups > 3  # else there would be no half-warm cache
    for name, leave in LEFT.items():
        shutil.rmtree(fresh_cache)
        leave(make_model, sequences, how)
        run = Run(make_model, sequences, **how).epoch().epoch(1).close()
        assert_same_adapters(cold, run)
        n_computed = run.cache.n_computed_groups
        assert (n_computed == 0) is (name == "all")
        assert (n_computed == cold.cache.n_computed_groups) is (name == "other data")


@DTYPES
@pytest.mark.parametrize("order", ["pairs", "iid", "neighbours"])
def test_in_every_order_of_the_rows(
    make_model: MakeModel, order: StepOrder, dtype: torch.dtype
) -> None:
    """A prompt's states are used in several trees of an epoch."""
    sequences, how = make_sequences(), {"dtype": dtype, "order": order}
    runs = [Run(make_model, sequences, **how).epoch().epoch(1).close() for _ in range(2)]
    assert runs[1].counts() == (n_trees(sequences, 0, 1, order=order), 0)
    assert_same_adapters(*runs)


@DTYPES
def test_every_asker_gets_the_state_that_a_fixed_group_has(
    make_model: MakeModel, dtype: torch.dtype
) -> None:
    """Asked for by single sequences, in two orders, by parts of the data, and by all at once."""
    walk, sequences = TreeWalk(make_model("llama").to(dtype), 2), make_sequences()
    everything = build_tree(sequences, np.arange(len(sequences)))
    found = []
    for seed, parts in ((0, 23), (1, 23), (2, 5), (3, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SWLORA_CACHE", str(Path(os.environ["SWLORA_CACHE"]) / str(seed)))
            cache = PrefixCache(walk, sequences, limit_gb=1, say=print)
        order = np.random.default_rng(seed).permutation(len(sequences))
        for ids in np.array_split(order, parts):
            tree = build_tree(sequences, ids)
            cache(tree, TreeLayout(tree, torch.device("cpu")))
        found.append(cache(everything, TreeLayout(everything, torch.device("cpu"))))
        assert cache.n_read_trees >= 1
        cache.close()
    assert all(torch.equal(found[0], states) for states in found[1:])
    expected = walk.prefix(TreeLayout(everything, torch.device("cpu")))
    atol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[0], expected, rtol=1e-2, atol=atol)


@DTYPES
def test_damaged_states_are_computed_to_the_same_bits(
    make_model: MakeModel, prefix_folder: Path, dtype: torch.dtype
) -> None:
    sequences, how = make_sequences(), {"dtype": dtype}
    cold = Run(make_model, sequences, **how).epoch().close()
    states = only_folder(prefix_folder) / "states"
    whole = states.read_bytes()
    for place in (0, len(whole) // 3, len(whole) - 1):
        states.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        run = Run(make_model, sequences, **how).epoch().close()
        assert_same_adapters(cold, run)
        assert run.cache.n_computed_groups == 1 and n_trees(sequences) > 3
        assert states.read_bytes() == whole


@pytest.mark.slow
@DTYPES
def test_states_of_the_embedded_model_whoever_asks(builtin_dir: Path, dtype: torch.dtype) -> None:
    """At real widths, where bf16 does not round the trees' differences away as in tiny models.

    With two threads, among which a product may be split by its size.
    """
    torch.set_num_threads(2)
    model = load_model(ModelSpec(name=str(builtin_dir), device="cpu", dtype="float32")).model
    walk, sequences = TreeWalk(model.to(dtype), 26), long_sequences()
    ids = np.arange(len(sequences))
    everything = build_tree(sequences, ids)
    layout = TreeLayout(everything, torch.device("cpu"))
    found = []
    for folder, parts in (("alone", 12), ("together", 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SWLORA_CACHE", str(Path(os.environ["SWLORA_CACHE"]) / folder))
            cache = PrefixCache(walk, sequences, limit_gb=1, say=print)
        for part in np.array_split(ids, parts):
            tree = build_tree(sequences, part)
            cache(tree, TreeLayout(tree, torch.device("cpu")))
        found.append(cache(everything, layout))
        cache.close()
    assert torch.equal(*found)


def long_sequences() -> TokenSequences:
    """Four prompts of 40 tokens with six completions of 30 each."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(100, 9000, 40).tolist() for _ in range(4)]
    return TokenSequences.from_lists(
        [(prompt, rng.integers(100, 9000, 30).tolist()) for prompt in prompts for _ in range(6)]
    )
