"""On a GPU: a tree step against the plain step of transformers and PEFT, for every family."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests.kernels.test_tree_attention import relative_errors
from tests.kernels.trees import random_tree
from tests.support.adapters import attach, fill_b
from tests.support.gradients import Measured, measure
from tests.support.models import MakeModel
from tests.support.sequences import branching, deep
from tests.training.test_exactness import SHAPES
from torch import Tensor

from swlora.adapters.methods import train_mode, trainable_parameters
from swlora.config import AdapterSpec
from swlora.data.token_sequences import TokenSequences
from swlora.kernels import cuda_attention, torch_attention, tree_walk
from swlora.kernels.attention_interface import Scoring
from swlora.kernels.tree_attention import chunk_attention
from swlora.kernels.tree_layout import TreeLayout
from swlora.models.precision import cast_parameters
from swlora.training.plain import PlainStep
from swlora.training.step import TreeStep

pytestmark = pytest.mark.gpu

# The kernels take heads of 16 channels or more.
WIDE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64},
    "gpt_neox": {"hidden_size": 64},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64},
}
WIDE_LLAMA = {"hidden_size": 64, "head_dim": 16}
WAYS: dict[str, Callable[..., Tensor]] = {
    "flex": torch_attention.flex,
    "dense": torch_attention.dense,
    "chunks": chunk_attention,
}


def adapted(make_model: MakeModel, shape: str, device: str, dtype: torch.dtype) -> Any:
    model_type, changes = SHAPES[shape]
    wide = WIDE.get(model_type, WIDE_LLAMA)
    model = make_model(model_type, **{"initializer_range": 0.05, **wide, **changes})
    cast_parameters(model, dtype)
    layers = list(range(model.config.num_hidden_layers))
    peft_model = attach(model.to(device), AdapterSpec(rank=3, alpha=7), layers, seed=1)
    fill_b(peft_model.to("cpu"))  # the same numbers on every device
    train_mode(peft_model)
    return peft_model.to(device)


def errors(found: Measured, expected: Measured) -> dict[str, float]:
    return {
        name: float((found.gradients[name].double().cpu() - own).norm() / own.norm())
        for name, g in expected.gradients.items()
        for own in [g.double().cpu()]
    }


def both(peft_model: Any, sequences: TokenSequences) -> tuple[Measured, Measured]:
    """What the tree step and the plain step compute, the first in two trees."""
    parameters: Mapping[str, Any] = trainable_parameters(peft_model)
    ids = np.arange(len(sequences))
    plain = measure(PlainStep(peft_model, sequences), parameters, [ids])
    halves = [ids[: len(ids) // 2], ids[len(ids) // 2 :]]
    return measure(TreeStep(peft_model, sequences), parameters, halves), plain


def use(way: str, shape: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "flex" and device == "cpu":
        pytest.skip("flex_attention has no gradient on a CPU")
    if way == "dense" and "soft caps" in shape:
        pytest.skip("scaled_dot_product_attention has no soft cap")
    if way != "chosen":
        monkeypatch.setattr(tree_walk, "tree_attention", WAYS[way])


@pytest.mark.parametrize("way", ["flex", "dense", "chunks"])
@pytest.mark.parametrize("shape", ["llama, grouped heads, own head", "mistral, window 5", "gpt2"])
def test_bfloat16_gradients_are_as_near_to_float32_as_those_of_peft(
    make_model: MakeModel, device: str, shape: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(way, shape, device, monkeypatch)
    sequences = TokenSequences.from_lists(branching())
    _, exact = both(adapted(make_model, shape, device, torch.float32), sequences)
    tree, plain = both(adapted(make_model, shape, device, torch.bfloat16), sequences)
    assert tree.sum_nats == pytest.approx(exact.sum_nats, rel=1e-2)
    ours, theirs = (np.mean(list(errors(m, exact).values())) for m in (tree, plain))
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("way", ["chosen", "flex", "dense", "chunks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_gradients_are_those_of_peft(
    make_model: MakeModel, device: str, shape: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "chosen" and shape not in ("llama, grouped heads, own head", "gpt2"):
        pytest.skip("chosen among the ways that are tested here one by one")
    use(way, shape, device, monkeypatch)
    sequences = TokenSequences.from_lists(deep())
    tree, plain = both(adapted(make_model, shape, device, torch.float32), sequences)
    assert tree.n_tokens == plain.n_tokens
    assert tree.sum_nats == pytest.approx(plain.sum_nats, rel=1e-5)
    assert max(errors(tree, plain).values()) < 1e-4  # other kernels, other orders of summation
    if way == "chosen" and device == "cuda":
        assert cuda_attention.chosen()


def test_lengths_share_what_was_compiled(device: str) -> None:
    if device == "cpu":
        pytest.skip("flex_attention has no gradient on a CPU")
    start, counts = torch_attention.n_compiled(), []
    for n_nodes in (100, 700, 1500, 3000, 2200):
        layout = TreeLayout(random_tree(n_nodes, n_nodes), torch.device(device))
        generator = torch.Generator(device).manual_seed(n_nodes)
        q, k, v, d_out = (
            torch.randn(1, heads, layout.n_nodes, 64, generator=generator, device=device)
            for heads in (9, 3, 3, 9)
        )
        found = []
        for way in (torch_attention.flex, torch_attention.dense):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            out = way(layout, *inputs, Scoring(0.125))
            found.append((out, *torch.autograd.grad(out, inputs, d_out.transpose(1, 2))))
        assert max(relative_errors(*found)) < 1e-4
        counts.append(torch_attention.n_compiled() - start)
    assert counts[-1] == counts[1] <= 4
