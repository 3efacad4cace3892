"""Every method under the engine: prefix trees against PEFT's own forward on the padded batch."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import CASES, adapter_spec, move
from tests.support.gradients import measure
from tests.support.models import MakeModel
from tests.support.sequences import branching

from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import adapt, train_mode
from swlora.data.prefix_tree import build_tree
from swlora.data.token_sequences import TokenSequences
from swlora.kernels.lora import FastLora, lora_forwards
from swlora.kernels.patched_forwards import patched_forwards
from swlora.training.plain import PlainStep
from swlora.training.step import TreeStep

PLAIN_FORWARD = {"full", "supertuning"}


def perturbed(make_model: MakeModel, method: str, model_type: str, **changes: Any) -> Adapted:
    """Adapters in blocks 1 and 2 of 3, every trained number moved as by some training."""
    model = make_model(model_type, initializer_range=0.05)
    adapted = adapt(model, adapter_spec(method, **changes), [1, 2], seed=1, n_steps=100)
    move(adapted.parameters.values(), 0.03)
    train_mode(adapted.model)
    return adapted


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        # Where all keys are alike the gradient of a query is next to nothing, and noise.
        scale = max(float(value.norm()), 1e-3 * largest)
        error = float((found[name] - value).norm()) / scale
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_trees_equal_peft_on_the_padded_batch(
    make_model: MakeModel, method: str, model_type: str
) -> None:
    adapted = perturbed(make_model, method, model_type)
    sequences = TokenSequences.from_lists(branching())
    n = len(sequences)
    plain = measure(PlainStep(adapted.model, sequences), adapted.parameters, [np.arange(n)])
    tree = measure(TreeStep(adapted.model, sequences), adapted.parameters, [np.arange(n)])
    assert build_tree(sequences, np.arange(n)).token_ids.size < 0.8 * sequences.lengths.sum()
    assert tree[1] == plain[1]
    assert tree[0] == pytest.approx(plain[0], rel=1e-5)
    assert_same_gradients(tree[2], plain[2])


@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_which_methods_have_a_fast_forward(
    make_model: MakeModel, method: str, model_type: str
) -> None:
    model = perturbed(make_model, method, model_type).model
    with patched_forwards(lora_forwards(model)):
        forwards = [vars(module).get("forward") for module in model.modules()]
        n_fast = sum(isinstance(forward, FastLora) for forward in forwards)
    n_projections = 2 * {"gpt2": 4, "llama": 7}[model_type]
    assert n_fast == (0 if method in PLAIN_FORWARD else n_projections)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_full_is_torch_with_unfrozen_weights(make_model: MakeModel, model_type: str) -> None:
    """The oracle is the bare model, the same weights set free, on the padded batch."""
    adapted = perturbed(make_model, "full", model_type)
    sequences = TokenSequences.from_lists(branching())
    tree = measure(
        TreeStep(adapted.model, sequences), adapted.parameters, [np.arange(len(sequences))]
    )

    bare = make_model(model_type, initializer_range=0.05)
    names = {name: _bare_name(name) for name in adapted.parameters}
    free = {name: bare.get_parameter(bare_name) for name, bare_name in names.items()}
    with torch.no_grad():
        for name, parameter in free.items():
            parameter.copy_(adapted.parameters[name]).requires_grad_()
    projections = {"gpt2": 4, "llama": 7}[model_type]
    assert len(free) == 2 * projections * (2 if model_type == "gpt2" else 1)  # biases, too
    plain = measure(PlainStep(bare, sequences), free, [np.arange(len(sequences))])
    assert tree[0] == pytest.approx(plain[0], rel=1e-5)
    assert_same_gradients(tree[2], plain[2])


def _bare_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_bfloat16_models_have_float32_gradients_near_the_truth(
    make_model: MakeModel, method: str, model_type: str
) -> None:
    """The truth is the same adapted model in float64; bfloat16 rounds by up to 1/256."""
    adapted = perturbed(make_model, method, model_type)
    sequences = TokenSequences.from_lists(branching())
    model, n = adapted.model, len(sequences)
    for module in model.modules():  # the frozen weights, rounded as a bfloat16 model has them
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    tree = measure(TreeStep(model, sequences), adapted.parameters, [np.arange(n)])
    model.double()
    truth = measure(PlainStep(model, sequences), adapted.parameters, [np.arange(n)])
    assert tree[0] == pytest.approx(truth[0], rel=1e-2)
    assert {gradient.dtype for gradient in tree[2].values()} == {torch.float32}
    assert _distance(tree[2], truth[2]) < 3 / 256


def _distance(found: dict[str, Any], truth: dict[str, Any]) -> float:
    """Relative distance of all gradients together."""
    off = sum(float((found[name] - truth[name]).norm()) ** 2 for name in truth)
    return float(np.sqrt(off / sum(float(value.norm()) ** 2 for value in truth.values())))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "pissa"])
def test_dropout_is_the_adapters_and_on_in_training_only(
    make_model: MakeModel, method: str
) -> None:
    adapted = perturbed(make_model, method, "llama", dropout=0.4)
    sequences = TokenSequences.from_lists(branching())
    for step_class in (TreeStep, PlainStep):
        step = step_class(adapted.model, sequences)
        groups = [np.arange(len(sequences))]
        train_mode(adapted.model)
        torch.manual_seed(1)
        first, again = step(groups).sum_nats, step(groups).sum_nats
        torch.manual_seed(1)
        assert step(groups).sum_nats == first != again
        adapted.model.eval()
        assert step(groups).sum_nats == step(groups).sum_nats != first
