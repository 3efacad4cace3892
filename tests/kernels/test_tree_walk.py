"""A decoder walked over trees, whole and cut in two, against its forward on single sequences."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models import MakeModel
from torch import Tensor, nn

from swlora.data.prefix_tree import PrefixTree, build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError
from swlora.kernels.tree_layout import TreeLayout
from swlora.kernels.tree_walk import TreeWalk
from swlora.models.anatomy import FAMILIES, Anatomy

MODEL_TYPES = [t for f in FAMILIES if f.has_attention_interface for t in f.model_types]
N_BLOCKS = 3
PAIRS = [([5, 6, 7], [8, 9, 4]), ([5, 6, 7], [8, 3, 3, 1]), ([5, 6], [9, 2]), ([2], [2, 2, 7])]


def make_tree(pairs: list[tuple[list[int], list[int]]] = PAIRS) -> tuple[PrefixTree, TreeLayout]:
    tree = build_tree(TokenSequences.from_lists(pairs), np.arange(len(pairs)))
    return tree, TreeLayout(tree, torch.device("cpu"))


def patched(model: nn.Module) -> list[str]:
    """Names of the modules that have a forward of their own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def states_of_block(model: Any, cut: int, ids: list[int]) -> Tensor:
    """What the model's plain forward hands to block `cut`, (T, D)."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    hook = Anatomy(model).blocks[cut].register_forward_pre_hook(keep, with_kwargs=True)
    model(torch.tensor([ids]))
    hook.remove()
    return kept[0][0]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_cut_gives_the_whole(make_model: MakeModel, model_type: str) -> None:
    model = make_model(model_type)
    _, layout = make_tree()
    whole = TreeWalk(model, 0).whole(layout)
    assert whole.shape[:2] == (1, layout.n_nodes)
    for cut in range(N_BLOCKS):
        walk = TreeWalk(model, cut)
        torch.testing.assert_close(walk.suffix(layout, walk.prefix(layout)), whole)
        assert not patched(model)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nodes_have_the_states_of_their_sequences(make_model: MakeModel, model_type: str) -> None:
    model = make_model(model_type)
    tree, layout = make_tree()
    found = [TreeWalk(model, cut).prefix(layout)[0] for cut in range(N_BLOCKS)]
    final = TreeWalk(model, 1).whole(layout)[0]
    for leaf in range(layout.n_nodes):
        path = [j for j in range(leaf + 1) if leaf < tree.subtree_end[j]]
        ids = tree.token_ids[path].tolist()
        for cut, states in enumerate(found):
            torch.testing.assert_close(states[leaf], states_of_block(model, cut, ids)[-1])
        own = Anatomy(model).backbone(torch.tensor([ids]))[0][0, -1]
        torch.testing.assert_close(final[leaf], own)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_prefix_has_no_graph_and_the_suffix_none_below_the_cut(
    make_model: MakeModel, model_type: str
) -> None:
    model = make_model(model_type).requires_grad_()
    _, layout = make_tree()
    walk = TreeWalk(model, 1)
    hidden = walk.prefix(layout)
    assert not hidden.requires_grad and hidden.grad_fn is None
    walk.suffix(layout, hidden).square().sum().backward()
    for number, block in enumerate(walk.anatomy.blocks):
        has_gradient = [parameter.grad is not None for parameter in block.parameters()]
        assert all(has_gradient) if number >= 1 else not any(has_gradient)


def test_a_gradient_can_enter_the_prefix_state(make_model: MakeModel) -> None:
    walk = TreeWalk(make_model("llama"), 2)
    _, layout = make_tree()
    hidden = walk.prefix(layout).clone().requires_grad_()
    walk.suffix(layout, hidden).square().sum().backward()
    assert hidden.grad is not None and float(hidden.grad.norm()) > 0


@pytest.mark.parametrize("part", ["prefix", "suffix", "whole"])
def test_all_is_given_back_when_a_block_fails(make_model: MakeModel, part: str) -> None:
    model = make_model("llama")
    _, layout = make_tree()
    walk = TreeWalk(model, 2)
    attention, hidden = model.config._attn_implementation, walk.prefix(layout)
    expected = walk.whole(layout)

    def fail(*_args: Any) -> None:
        raise ZeroDivisionError

    # Block 0 runs in the prefix and in the whole, block 2 in the suffix and in the whole.
    hook = walk.anatomy.blocks[0 if part == "prefix" else 2].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        getattr(walk, part)(*((layout, hidden) if part == "suffix" else (layout,)))
    hook.remove()
    assert not patched(model)
    assert model.config._attn_implementation == attention
    assert torch.equal(walk.whole(layout), expected)


def test_a_forward_that_was_there_before_stays(make_model: MakeModel) -> None:
    model = make_model("llama")
    _, layout = make_tree()
    walk = TreeWalk(model, 1)
    block = walk.anatomy.blocks[1]
    original, calls = block.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return original(*args, **kwargs)

    block.forward = counted
    whole = walk.whole(layout)
    hidden = walk.prefix(layout)
    assert len(calls) == 1  # the prefix ends before the block
    torch.testing.assert_close(walk.suffix(layout, hidden), whole)
    assert len(calls) == 2
    assert vars(block)["forward"] is counted


@pytest.mark.parametrize("own_config", [0, 2])
def test_a_block_with_a_configuration_of_its_own_is_refused(
    make_model: MakeModel, own_config: int
) -> None:
    """It would attend as in one long sequence, and the loss would be wrong without a word."""
    model = make_model("llama")
    attention = model.model.layers[own_config].self_attn
    attention.config = copy.deepcopy(attention.config)
    _, layout = make_tree()
    with pytest.raises(RunFailedError, match="--engine plain"):
        TreeWalk(model, 1).whole(layout)
    walk = TreeWalk(model, 1)
    with pytest.raises(RunFailedError, match="--engine plain"):
        walk.suffix(layout, walk.prefix(layout))
    assert not patched(model)
