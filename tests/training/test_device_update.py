"""A step's end as on a GPU, with a fused optimizer and CPU tensors."""

from pathlib import Path

import pytest
import torch
from tests.support.toy_loop import fresh_parameters, metrics_of, run_loop, spec, start
from torch import Tensor, nn

from swlora.errors import DivergedError
from swlora.loss_sum import LossSum
from swlora.training import loop
from swlora.training.device_update import DeviceLoss, update_where_finite


def optimizer_of(weights: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights, lr=0.1, weight_decay=0.3, fused=True)


def always() -> Tensor:
    return torch.tensor(True)


@pytest.mark.parametrize("n_before", [0, 2])
@pytest.mark.parametrize(("nats", "norm"), [("inf", 1.0), ("nan", 1.0), (1.0, "inf"), (1.0, "nan")])
def test_what_is_not_finite_changes_nothing(n_before: int, nats: float, norm: float) -> None:
    weights = list(fresh_parameters().values())
    optimizer = optimizer_of(weights)

    def step(nats: float, norm: float) -> tuple[LossSum, float, bool]:
        for weight in weights:
            weight.grad = torch.full_like(weight, float(norm))
        loss = DeviceLoss(torch.tensor(float(nats)), 7)
        return update_where_finite(optimizer, loss, torch.tensor(float(norm)), always)

    for _ in range(n_before):
        step(2.0, 1.0)
    kept = [w.detach().clone() for w in weights]
    moments = [{k: v.clone() for k, v in optimizer.state[w].items()} for w in weights]
    loss, norm_value, is_usable = step(nats, norm)
    assert loss.n_tokens == 7 and is_usable
    assert not (torch.tensor(loss.sum_nats).isfinite() and torch.tensor(norm_value).isfinite())
    assert all(map(torch.equal, weights, kept))
    for weight, before in zip(weights, moments, strict=True):
        for name, value in before.items():
            assert torch.equal(optimizer.state[weight][name], value)
    step(2.0, 1.0)
    assert not any(map(torch.equal, weights, kept))  # the flag does not stay


def test_a_finite_step_is_that_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, device = start(tmp_path / "host"), start(tmp_path / "device")
    torch.manual_seed(5)
    expected, _ = run_loop(host, spec(weight_decay=0.1))
    monkeypatch.setattr(loop, "decides_on_device", lambda _adapted: True)
    torch.manual_seed(5)
    found, _ = run_loop(device, spec(weight_decay=0.1))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert metrics_of(device) == metrics_of(host)


@pytest.mark.parametrize("nats", [1e6 + 1 / 3, 1e39])
def test_a_loss_that_the_host_has_keeps_its_digits(nats: float) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    found = update_where_finite(optimizer_of([weight]), LossSum(nats, 7), torch.tensor(1.0), always)
    assert found.loss == LossSum(nats, 7)
    assert not torch.equal(weight.detach(), torch.ones(3))


def test_weights_that_cannot_be_used_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "decides_on_device", lambda _adapted: True)
    with pytest.raises(DivergedError, match="made weights that are not finite"):
        run_loop(start(tmp_path / "run"), spec(learning_rate=1e38, warmup_fraction=0))


def test_a_loss_is_read_where_it_is_asked_for() -> None:
    loss = DeviceLoss(torch.tensor(6.0, dtype=torch.float64), 4)
    assert loss.sum_nats == 6.0 and loss.nats_per_token == 1.5
    assert loss + LossSum(1.0, 1) == LossSum(7.0, 5)
