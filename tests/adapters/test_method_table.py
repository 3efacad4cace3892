"""The table of methods: what a method refuses before anything is changed, and a new entry."""

from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from tests.support.models import MakeModel

from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import (
    METHODS,
    Method,
    adapt,
    adapted_layers,
    adapted_modules,
    problems_of_fit,
)
from swlora.adapters.saved import load_adapter, save_adapter
from swlora.config import METHOD_SETTINGS, AdapterSpec, MethodName
from swlora.errors import UserError
from swlora.models.anatomy import Anatomy

TOKENS = torch.tensor([[72, 105, 33, 10, 200], [1, 2, 3, 4, 5]])


def spec(method: str, **changes: Any) -> AdapterSpec:
    return AdapterSpec(method=method, **changes)  # type: ignore[arg-type]


def started(model: Any, method: str, **changes: Any) -> Adapted:
    return adapt(model, spec(method, **changes), [0, 2], seed=1, n_steps=20)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


def test_the_table_and_the_configuration_name_the_same_methods() -> None:
    assert get_args(MethodName) == tuple(METHODS)
    assert set(METHODS) >= set(METHOD_SETTINGS)


# What does not fit


def test_supertuning_refuses_conv1d_before_anything_is_changed(make_model: MakeModel) -> None:
    model = make_model("gpt2")
    before = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=r"works on nn.Linear only, and this model has Conv1D"):
        started(model, "supertuning")
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("method", "rank", "first"),
    [
        ("lora", 17, 17),
        ("lora+", 99, 99),
        ("dora", 30, 30),
        ("adalora", 11, 17),
        ("adalora", 16, 24),
        ("pissa", 17, 17),
        ("rslora", 17, 17),
    ],
)
def test_a_rank_above_the_smallest_side_is_refused(
    make_model: MakeModel, method: str, rank: int, first: int
) -> None:
    message = f"--rank {rank} starts at rank {first}, and the smaller side of .*k_proj is 16; lower"
    with pytest.raises(UserError, match=message):
        started(make_model("llama"), method, rank=rank)


@pytest.mark.parametrize(("method", "rank"), [("lora", 16), ("pissa", 16), ("adalora", 10)])
def test_a_rank_up_to_the_smallest_side_works(
    make_model: MakeModel, method: str, rank: int
) -> None:
    adapted = started(make_model("llama"), method, rank=rank)
    torch.testing.assert_close(
        logits_of(adapted.model), logits_of(make_model("llama")), rtol=0, atol=1e-5
    )
    wide = started(make_model("llama"), method, rank=rank + 6, targets=["up_proj"])
    assert len(adapted_modules(wide.model)) == 2  # the smaller side of these is 24


def test_all_reasons_are_given_at_once(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    anatomy = Anatomy(make_model("gpt2"))
    assert problems_of_fit(spec("lora"), anatomy, [0, 2]) == []
    beyond = problems_of_fit(spec("lora"), anatomy, [0, 3])
    assert beyond == ["layer 3 does not exist; this model has 0 to 2"]
    picky = Method(METHODS["lora"].config, linear_only=True)
    monkeypatch.setitem(METHODS, "lora", picky)
    problems = problems_of_fit(spec("lora", rank=25), anatomy, [0])
    assert len(problems) == 2 and "Conv1D" in problems[0] and "25" in problems[1]
    with pytest.raises(UserError, match=r"Conv1D; lora with --rank 25"):
        adapt(make_model("gpt2"), spec("lora", rank=25), [0], seed=0)


# Another method is one entry


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("LoHaConfig", {"r": 3, "alpha": 6}), ("VeraConfig", {"r": 4}), ("IA3Config", None)],
)
def test_plugging_in_a_method_of_peft(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    settings: dict[str, Any] | None,
    layers: list[int],
) -> None:
    def config(_spec: AdapterSpec, site: Any) -> Any:
        own = {"feedforward_modules": []} if settings is None else settings
        return site.config(getattr(peft, name), **own)

    monkeypatch.setitem(METHODS, "new", Method(config, first_rank=None))
    new = AdapterSpec(targets=["q_proj", "o_proj"]).model_copy(update={"method": "new"})
    adapted = adapt(make_model("llama"), new, layers, seed=0)
    assert adapted_layers(adapted.model) == layers
    with torch.no_grad():
        for parameter in adapted.parameters.values():
            parameter.add_(0.1)
    adapted.finish()
    save_adapter(adapted.model, tmp_path / "adapter", {})
    loaded = load_adapter(make_model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded), logits_of(adapted.model), rtol=0, atol=1e-5)
