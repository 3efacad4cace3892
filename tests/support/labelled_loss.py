"""What transformers and PEFT say of tokens that are trained or not, or in part."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.support.adapters import attach, fill_b
from tests.support.gradients import Measured, measure
from tests.support.models import MakeModel

from swlora.adapters.methods import train_mode, trainable_parameters
from swlora.config import AdapterSpec
from swlora.loss_sum import LossSum

Weighted = tuple[list[int], list[float]]  # token ids, weight of each


def adapted(
    make_model: MakeModel, model_type: str, layers: Sequence[int] = (0, 1, 2), **changes: Any
) -> Any:
    model = make_model(model_type, initializer_range=0.05, **changes)
    spec = AdapterSpec(targets=["all-linear"], rank=3, alpha=7)
    peft_model = attach(model, spec, list(layers), seed=1)
    fill_b(peft_model)
    train_mode(peft_model)
    return peft_model


def labelled_loss(model: Any, ids: list[int], weights: list[float]) -> torch.Tensor:
    """The sum that transformers takes the mean of, labels being -100 where the weight is 0."""
    labels = [token if weight else -100 for token, weight in zip(ids, weights, strict=True)]
    out = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False)
    return out.loss * sum(weights)


def cross_entropy(model: Any, ids: list[int], weights: list[float]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return (losses * torch.tensor(weights[1:], dtype=torch.float64)).sum()


def oracle(
    model: Any, data: list[Weighted], loss_of: Callable[..., torch.Tensor] = labelled_loss
) -> Measured:
    def step(_trees: object) -> LossSum:
        total = 0.0
        for ids, weights in data:
            loss = loss_of(model, ids, weights)
            torch.autograd.backward(loss)
            total += float(loss.detach())
        return LossSum(total, sum(sum(weights) for _, weights in data))

    return measure(step, trainable_parameters(model), [])


def assert_close(found: Measured, expected: Measured, tolerance: float = 1e-5) -> None:
    assert found.n_tokens == pytest.approx(expected.n_tokens, rel=1e-6)
    assert found.sum_nats == pytest.approx(expected.sum_nats, rel=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = float((found.gradients[name] - gradient).norm() / gradient.norm())
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
