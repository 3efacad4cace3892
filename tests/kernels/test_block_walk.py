"""A decoder walked from any block to any block, against hooks on its plain forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swlora.kernels.block_walk import Walk
from swlora.models.anatomy import FAMILIES, MOE_FAMILIES, Anatomy

MakeModel = Callable[..., Any]
MODEL_TYPES = [t for f in (*FAMILIES, *MOE_FAMILIES) for t in f.model_types]
N_BLOCKS = 3
IDS = torch.tensor([[5, 6, 7, 8, 9, 4], [3, 3, 1, 2, 2, 7]])
INPUTS = {"input_ids": IDS, "use_cache": False}


def plain_states(model: Any) -> list[Tensor]:
    """The hidden states at the inputs of the blocks, and the final normed one."""
    anatomy, states = Anatomy(model), list[Tensor]()
    hooks = [
        block.register_forward_pre_hook(lambda _block, args: states.append(args[0]))
        for block in anatomy.blocks
    ]
    final = anatomy.backbone(**INPUTS)[0]
    for hook in hooks:
        hook.remove()
    return [*states, final]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_every_part_has_the_states_of_the_plain_forward(
    make_model: MakeModel, model_type: str
) -> None:
    model = make_model(model_type)
    walk, expected = Walk(Anatomy(model)), plain_states(model)
    for start in range(N_BLOCKS):
        for stop in (*range(start, N_BLOCKS), None):
            passed = range(start, N_BLOCKS if stop is None else stop + 1)
            part = {"start": start, "stop": stop, "keep": passed}
            found, kept = walk.run(INPUTS, entry=expected[start], **part)
            assert torch.equal(found, expected[-1 if stop is None else stop]), part
            assert list(kept) == list(passed)
            assert all(torch.equal(state, expected[layer]) for layer, state in kept.items())
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    "part", [{}, {"stop": 1}, {"stop": 0}, {"start": 1, "stop": 2}, {"start": 2}], ids=str
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "opt"])
def test_every_hook_fires_whatever_part_is_walked(
    make_model: MakeModel, model_type: str, part: dict[str, int]
) -> None:
    """Sharding gathers weights before a forward and frees them behind it: none may be left out."""
    model = make_model(model_type)
    anatomy = Anatomy(model)
    walk, states = Walk(anatomy), plain_states(model)
    assert anatomy.final_norm is not None
    hooked = [*anatomy.blocks, anatomy.final_norm, anatomy.backbone]
    before: list[nn.Module] = []
    behind: list[nn.Module] = []
    for module in hooked:
        module.register_forward_pre_hook(lambda module, _args: before.append(module))
        module.register_forward_hook(lambda module, _args, _output: behind.append(module))
    walk.run(INPUTS, entry=states[part.get("start", 0)], **part)
    assert behind == hooked
    assert before == [anatomy.backbone, *anatomy.blocks, anatomy.final_norm]


def test_only_the_blocks_of_the_walk_are_run(make_model: MakeModel) -> None:
    model = make_model("llama")
    states, ran = plain_states(model), list[int]()
    for layer, block in enumerate(Anatomy(model).blocks):
        block.mlp.register_forward_hook(lambda *_args, layer=layer: ran.append(layer))
    Walk(Anatomy(model)).run(INPUTS, start=1, entry=states[1], stop=2)
    assert ran == [1]


@pytest.mark.parametrize(
    "part",
    [{"start": 1}, {"stop": 3}, {"start": -1}, {"stop": 1, "keep": [2]}, {"keep": [3]}],
    ids=str,
)
def test_blocks_that_are_not_passed_are_refused(
    make_model: MakeModel, part: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="walk"):
        Walk(Anatomy(make_model("llama"))).run(INPUTS, **part)
