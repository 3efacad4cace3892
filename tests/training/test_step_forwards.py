"""The forwards of a training step: made once, always with the present weights, gone at the end."""

import gc
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import attach, fill_b
from tests.support.gradients import measure
from tests.support.models import MakeModel

from swlora.adapters.methods import train_mode, trainable_parameters
from swlora.config import AdapterSpec
from swlora.data.token_sequences import TokenSequences
from swlora.kernels.linear import packed_weight
from swlora.models.anatomy import Anatomy, Projection
from swlora.training import step as module
from swlora.training.step import TreeStep

IDS = [np.arange(5)]

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


def adapted(make_model: MakeModel, method: str = "lora") -> Any:
    """A llama of three blocks; the lowest has no adapter."""
    model = attach(make_model("llama"), AdapterSpec(method=method, rank=2), [1, 2], seed=1)
    fill_b(model)
    train_mode(model)
    return model


def make_sequences() -> TokenSequences:
    return TokenSequences.from_lists([([1, 2, 3], [4 + i, 5, 6 + i]) for i in range(5)])


def held() -> int:
    gc.collect()
    return packed_weight.held_bytes()


def weight_bytes(projection: Projection) -> int:
    module: Any = getattr(projection.module, "base_layer", projection.module)
    return int(module.weight.nbytes)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_they_are_made_once_and_follow_the_weights(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    made, fast_forwards = [], module.fast_forwards

    def counting(model: Any) -> Any:
        made.append(model)
        return fast_forwards(model)

    monkeypatch.setattr(module, "fast_forwards", counting)
    model, sequences = adapted(make_model, method), make_sequences()
    parameters, head = trainable_parameters(model), model.get_base_model().lm_head
    step = TreeStep(model, sequences)
    assert not made
    copies = set()
    for n_steps in range(1, 4):
        found = measure(step, parameters, IDS)
        assert len(made) == n_steps  # one for this step, one for each other below
        expected = measure(TreeStep(model, sequences), parameters, IDS)
        assert found.sum_nats == expected.sum_nats
        assert all(map(torch.equal, found.gradients.values(), expected.gradients.values()))
        copies.add(packed_weight.packed_weight([head]))
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(1.3)
        head.weight.data.mul_(1.1)  # without a trace on the tensor
    assert len(copies) == 1


def test_copies_are_made_once_and_go_when_the_step_does(make_model: MakeModel) -> None:
    n_before = held()
    model = adapted(make_model)
    step = TreeStep(model, make_sequences())
    assert held() == n_before
    step(IDS)
    anatomy = Anatomy(model.get_base_model())
    by_layer = [sum(map(weight_bytes, anatomy.projections(layer))) for layer in range(3)]
    both = by_layer[1] + by_layer[2] + anatomy.head.get_parameter("weight").nbytes
    qkv: list[Any] = [p.module for p in anatomy.projections(1)[:3]]  # their input has no gradient
    n_bytes = by_layer[0] + 2 * both - sum(module.base_layer.weight.nbytes for module in qkv)
    assert held() - n_before == n_bytes
    tensors = {id(copy.tensor()) for copy in packed_weight._HELD.values()}
    n_held = held()
    step(IDS)
    assert {id(copy.tensor()) for copy in packed_weight._HELD.values()} == tensors
    other = TreeStep(model, make_sequences())
    other(IDS)
    assert held() == n_held  # shared, and counted once
    step.close()
    assert held() == n_held
    gc.disable()
    try:
        del other
        assert packed_weight.held_bytes() == n_before  # no cycle keeps them
    finally:
        gc.enable()
