"""The prefix cache: the states of plain forward passes, read from then on, and its key."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models import MakeModel
from tests.support.prefix_runs import (
    Run,
    adapted,
    assert_same_adapters,
    make_sequences,
    n_fixed_groups,
    n_trees,
    steps_of,
)

from swlora.adapters.methods import trainable_parameters
from swlora.data.fixed_groups import fixed_groups
from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.processes.world import World
from swlora.training import frozen_prefix
from swlora.training.frozen_prefix import PrefixCache, content_key

pytestmark = pytest.mark.usefixtures("fresh_cache", "small_fixed_groups")


def test_a_training_without_a_cache_and_one_that_reads_from_the_second_epoch_on(
    make_model: MakeModel,
) -> None:
    sequences = make_sequences()
    plain = Run(make_model, sequences, limit_gb=0.0).epoch()
    cached = Run(make_model, sequences).epoch()
    n_read, n_computed = cached.counts()
    assert n_computed == n_fixed_groups(sequences) >= 5
    assert n_read < n_trees(sequences)
    for number in (1, 2):  # trees are cut anew
        plain.epoch(number)
        cached.epoch(number)
    assert cached.counts() == (n_read + n_trees(sequences, 1, 2), n_computed)
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
    assert second.counts() == (n_trees(sequences), 0)
    assert_same_adapters(first, second)


def test_a_run_that_was_cut_short_leaves_what_it_computed(make_model: MakeModel) -> None:
    sequences = make_sequences()
    first = Run(make_model, sequences)
    first.step(steps_of(sequences, 0)[0])
    n_first = first.close().counts()[1]
    second = Run(make_model, sequences)
    assert len(second.said) == 1 and "100%" not in second.said[0]
    second.epoch()
    assert 0 < n_first < n_fixed_groups(sequences)
    assert second.counts()[1] == n_fixed_groups(sequences) - n_first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "opt"])
def test_states_are_those_of_their_group_and_come_back_as_they_were(
    make_model: MakeModel, model_type: str, dtype: torch.dtype
) -> None:
    walk, sequences = TreeWalk(make_model(model_type).to(dtype), 2), make_sequences()
    cache = PrefixCache(walk, sequences, limit_gb=1, say=print)
    groups = fixed_groups(sequences)
    n_groups = len(groups.n_shared)
    for group in range(n_groups):
        tree = build_tree(sequences, groups.sequence_ids(group))
        layout = TreeLayout(tree, torch.device("cpu"))
        expected = walk.prefix(layout)
        for n_computed in (group + 1, group + 1):  # computed, then read
            states = cache(tree, layout)
            own = groups.n_shared[group]
            assert torch.equal(states[:, own:], expected[:, own:])
            torch.testing.assert_close(states, expected, rtol=1e-2, atol=1e-2)
            assert states.dtype == dtype and not states.requires_grad
            assert cache.n_computed_groups == n_computed
    assert (cache.n_read_trees, n_groups > 3) == (n_groups, True)
    mixed = build_tree(sequences, np.array([1, 6, 11, 22]))
    states = cache(mixed, TreeLayout(mixed, torch.device("cpu")))
    expected = walk.prefix(TreeLayout(mixed, torch.device("cpu")))
    torch.testing.assert_close(
        states, expected, rtol=1e-2, atol=1e-2 if dtype != torch.float32 else 1e-5
    )
    assert cache.n_computed_groups == n_groups
    cache.close()


def key(model: Any, sequences: TokenSequences, cut: int = 1) -> str:
    return content_key(TreeWalk(model, cut), sequences)


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
        sequences.weights,
    )
    assert key(model, shorter) != own


def test_states_of_other_packages_are_not_read(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another torch may round in another way."""
    sequences = make_sequences()
    own = key(make_model("llama"), sequences)
    versions = frozen_prefix.package_versions() | {"torch": "1.0"}
    monkeypatch.setattr(frozen_prefix, "package_versions", lambda: versions)
    assert key(make_model("llama"), sequences) != own


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
    weights = np.zeros(len(sequences.tokens), dtype=np.float32)
    weights[sequences.offsets[1:] - 1] = 0.5
    other_weights = TokenSequences(sequences.tokens, sequences.offsets, weights)
    assert key(make_model("llama"), other_weights) == own


def test_two_runs_over_the_same_content_share_their_states(make_model: MakeModel) -> None:
    sequences = make_sequences()
    walk = TreeWalk(make_model("llama"), 1)
    first = PrefixCache(walk, sequences, limit_gb=1, say=print)
    second = PrefixCache(walk, sequences, limit_gb=1, say=print)
    bounds = list(pairwise((0, 1, 3, 6, 10, 11, 13, 16, 20, 21, 23)))
    assert bounds[-1][1] == len(sequences)
    trees = [build_tree(sequences, np.arange(*bound)) for bound in bounds]
    layouts = [TreeLayout(tree, torch.device("cpu")) for tree in trees]
    found = [
        (first, second)[number % 2](tree, layout)
        for number, (tree, layout) in enumerate(zip(trees, layouts, strict=True))
    ]
    for number, (tree, layout) in enumerate(zip(trees, layouts, strict=True)):
        cache = (second, first)[number % 2]  # what the other one wrote too
        assert torch.equal(cache(tree, layout), found[number])
        torch.testing.assert_close(found[number], walk.prefix(layout))
    first.close()
    second.close()
    third = PrefixCache(walk, sequences, limit_gb=1, say=print)
    for tree, layout, states in zip(trees, layouts, found, strict=True):
        assert torch.equal(third(tree, layout), states)
    assert (third.n_read_trees, third.n_computed_groups) == (len(trees), 0)
    third.close()


def test_what_another_process_of_the_run_has_computed_is_not_computed_again(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both opened the cache when it was empty."""
    monkeypatch.setattr(frozen_prefix, "world", lambda: World(0, 2, 0, 2))
    sequences = make_sequences()
    first, second = Run(make_model, sequences), Run(make_model, sequences)
    first.epoch()
    second.epoch()
    assert (first.counts()[1], second.counts()[1]) == (n_fixed_groups(sequences), 0)
    assert_same_adapters(first, second)


def test_every_machine_has_its_own_cache(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, prefix_folder: Path
) -> None:
    """Their cache folder may be the same one; files of a network are not safe to share."""
    sequences = make_sequences()
    for machine in range(2):
        monkeypatch.setattr(frozen_prefix, "world", lambda m=machine: World(m, 2, 0, 1, m))
        Run(make_model, sequences).close()
    assert len(list(prefix_folder.iterdir())) == 2
