"""Saved in the middle of a training: what is loaded computes the same, and the training goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.support.adapters import adapter_spec
from tests.support.models import MakeModel
from torch import Tensor

from swlora.adapters import adalora
from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import METHODS, adapt, train_mode
from swlora.adapters.saved import load_adapter, save_adapter

N_STEPS = 12
IDS = torch.arange(1, 25).reshape(2, 12)


def start(make_model: MakeModel, method: str, dtype: torch.dtype) -> Adapted:
    spec = adapter_spec(method)
    adapted = adapt(make_model("llama").to(dtype), spec, [1, 2], seed=1, n_steps=N_STEPS)
    train_mode(adapted.model)
    return adapted


def train(adapted: Adapted, first: int, last: int, optimizer: Any = None) -> Any:
    """Run the steps `first` to `last`, the optimizer's moments going on; return the optimizer."""
    parameters = adapted.parameters.values()
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=0.02)
    for number in range(first, last + 1):
        adapted.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        adapted.after_step(number)
        optimizer.zero_grad()
    return optimizer


def everything(adapted: Adapted) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapted.model.state_dict().items()}


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 5, 9])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_was_measured_and_leaves_no_trace(
    method: str,
    at: int,
    dtype: torch.dtype,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AdaLoRA prunes after steps 4 and 6 here: at 5 what was pruned grows again."""
    monkeypatch.setattr(adalora, "STEPS_BETWEEN", 2 / N_STEPS)
    adapted = start(make_model, method, dtype)
    optimizer = train(adapted, 1, at)
    measured, before = logits(adapted.model), everything(adapted)
    train_mode(adapted.model)
    config = json.dumps(adapted.model.peft_config["default"].to_dict(), default=str)
    with adapted.as_saved():
        save_adapter(adapted.model, tmp_path / "best", {})
    after = everything(adapted)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert config == json.dumps(adapted.model.peft_config["default"].to_dict(), default=str)
    found = dict(adapted.model.named_parameters())
    assert all(found[name] is parameter for name, parameter in adapted.parameters.items())

    loaded = load_adapter(make_model("llama").to(dtype), tmp_path / "best")
    rounding = 1e-5 if dtype == torch.float32 else 0.05  # PiSSA's, of the weights it started from
    if method != "pissa":
        rounding = 1e-6 if dtype == torch.float32 else 0.02
    scale = float(measured.abs().max())
    assert float((logits(loaded) - measured).abs().max()) < rounding * scale

    untouched = start(make_model, method, dtype)
    train(untouched, at + 1, N_STEPS, train(untouched, 1, at))
    train(adapted, at + 1, N_STEPS, optimizer)
    for name, parameter in untouched.parameters.items():
        assert torch.equal(adapted.parameters[name], parameter), name
    assert adapted.ranks == untouched.ranks


def test_between_two_prunings_what_grows_again_is_saved_too(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that PEFT noted at the last pruning would drop it."""
    monkeypatch.setattr(adalora, "STEPS_BETWEEN", 2 / N_STEPS)
    adapted = start(make_model, "adalora", torch.float32)
    optimizer = train(adapted, 1, 4)
    n_pruned = sum((adapted.ranks or {}).values())
    train(adapted, 5, 5, optimizer)
    assert sum((adapted.ranks or {}).values()) == n_pruned
    measured = logits(adapted.model)
    with adapted.as_saved():
        assert sum((adapted.ranks or {}).values()) > n_pruned
        save_adapter(adapted.model, tmp_path / "best", {})
    assert sum((adapted.ranks or {}).values()) == n_pruned
    save_adapter(adapted.model, tmp_path / "as-noted", {})
    base = make_model("llama")
    plain = PeftModel.from_pretrained(base, str(tmp_path / "best"))
    assert torch.allclose(logits(plain), measured, atol=1e-5)
    noted = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "as-noted"))
    assert not torch.allclose(logits(noted), measured, atol=1e-4)
