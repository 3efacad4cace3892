"""Linear maps of other libraries, whose weights are packed or scaled: their own forward counts."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.support.adapters import attach, fill_b
from tests.support.gradients import measure
from tests.support.models import MakeModel
from tests.support.sequences import branching
from torch import Tensor, nn
from torch.nn import functional as F

from swlora.adapters.methods import problems_of_fit, train_mode, trainable_parameters
from swlora.config import AdapterSpec
from swlora.data.token_sequences import TokenSequences
from swlora.evaluation.loss import dataset_loss
from swlora.kernels.token_nats import token_nats
from swlora.models.anatomy import Anatomy
from swlora.models.linear_maps import is_linear_map
from swlora.progress import Silent
from swlora.training.plain import PlainStep
from swlora.training.step import TreeStep


class Halved(nn.Linear):
    """A map that reads its weight in another way than nn.Linear, as quantised ones do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / 2, self.bias)


class Packed(nn.Linear):
    """A map that keeps two numbers of its weight in a byte, as bitsandbytes does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(weight, requires_grad=False)


class OtherTensor(Tensor):
    """A tensor of another library."""


def halved(model: Any, *names: str) -> Any:
    """The model with the maps of these last names halved."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            module.__class__ = Halved
    return model


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("names", [("q_proj", "down_proj"), ("lm_head",)])
def test_a_step_computes_as_they_do(
    make_model: MakeModel, names: tuple[str, ...], method: str
) -> None:
    model = halved(make_model("llama", initializer_range=0.05), *names)
    peft_model = attach(model, AdapterSpec.model_validate({"method": method}), [1, 2], seed=1)
    fill_b(peft_model)
    train_mode(peft_model)
    sequences = TokenSequences.from_lists(branching())
    parameters, groups = trainable_parameters(peft_model), [np.arange(len(sequences))]
    expected = measure(PlainStep(peft_model, sequences), parameters, groups)
    found = measure(TreeStep(peft_model, sequences), parameters, groups)
    assert found.sum_nats == pytest.approx(expected.sum_nats, rel=1e-6)
    for name, gradient in expected.gradients.items():
        assert float((found.gradients[name] - gradient).norm() / gradient.norm()) < 1e-4, name
    loss = dataset_loss(peft_model.eval(), sequences, Silent())
    assert loss.sum_nats == pytest.approx(expected.sum_nats, rel=1e-6)


def test_the_nats_of_text_are_those_of_its_head(make_model: MakeModel) -> None:
    model, ids = halved(make_model("llama"), "lm_head"), torch.arange(12).view(2, 6)
    with torch.no_grad():
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
        found = token_nats(Anatomy(model), model.model(ids).last_hidden_state, ids)
    expected = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_their_weights_are_not_read(make_model: MakeModel) -> None:
    """Neither for the sides of a matrix, which a rank may not exceed, nor to change them."""
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    anatomy = Anatomy(model)
    fits = problems_of_fit(AdapterSpec(rank=3, targets=["q_proj"]), anatomy, [0, 1])
    (wide,) = problems_of_fit(AdapterSpec(rank=25, targets=["q_proj"]), anatomy, [0, 1])
    assert fits == [] and "q_proj is 24; lower --rank" in wide
    for method in ("full", "pissa", "supertuning"):
        spec = AdapterSpec.model_validate({"method": method, "targets": ["q_proj"]})
        (refused,) = problems_of_fit(spec, anatomy, [0, 1])
        assert refused.startswith(f"{method} changes the model's own weights, and")
        assert "Packed, a form of another library; choose lora" in refused


def test_a_weight_of_another_class_is_left_to_its_library() -> None:
    linear = nn.Linear(3, 4, bias=False)
    assert is_linear_map(linear)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(OtherTensor))
    assert not is_linear_map(linear)
