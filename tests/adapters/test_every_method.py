"""Every method by name: where it starts, what it trains, and what is saved."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.support.adapters import CASES, adapter_spec, move
from tests.support.models import MakeModel

from swlora.adapters.adapted import Adapted
from swlora.adapters.methods import METHODS, adapt, adapted_layers, adapted_modules
from swlora.adapters.saved import load_adapter, save_adapter
from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, weight_out_in
from swlora.models.precision import cast_parameters

TOKENS = torch.tensor([[72, 105, 33, 10, 200], [1, 2, 3, 4, 5]])


def started(model: Any, method: str, layers: list[int] | None = None, **changes: Any) -> Adapted:
    return adapt(model, adapter_spec(method, **changes), layers or [0, 2], seed=1, n_steps=20)


def trained(model: Any, method: str, layers: list[int] | None = None) -> Adapted:
    """Every trained number moved, as by some training."""
    adapted = started(model, method, layers)
    size = 0.2 if method == "adalora" else 0.05  # a product of three
    move(adapted.parameters.values(), size)
    adapted.model.eval()
    return adapted


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits.float()


def plain_peft(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def in_bfloat16(model: Any) -> Any:
    cast_parameters(model, torch.bfloat16)
    return model


# Where it starts


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_it_starts_as_the_base_model_in_the_chosen_layers(
    make_model: MakeModel, method: str, model_type: str, layers: list[int]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = started(make_model(model_type), method, layers)
    assert adapted_layers(adapted.model) == layers
    assert len(adapted_modules(adapted.model)) == len(layers) * {"gpt2": 4, "llama": 7}[model_type]
    found, expected = logits_of(adapted.model), logits_of(make_model(model_type))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_what_is_trained_is_float32_also_in_a_bfloat16_model(
    make_model: MakeModel, method: str, model_type: str
) -> None:
    adapted = started(in_bfloat16(make_model(model_type)), method)
    exact = started(make_model(model_type), method)
    assert {p.dtype for p in adapted.parameters.values()} == {torch.float32}
    shapes = [{n: p.shape for n, p in a.parameters.items()} for a in (adapted, exact)]
    assert shapes[0] == shapes[1]
    off = (logits_of(adapted.model) - logits_of(in_bfloat16(make_model(model_type)))).abs().max()
    assert float(off) < 0.1


def test_what_each_method_trains(make_model: MakeModel) -> None:
    counts = {
        method: sum(p.numel() for p in started(make_model("llama"), method).parameters.values())
        for method in METHODS
    }
    projections = [m for m in Anatomy(make_model("llama")).all_projections() if m.layer in (0, 2)]
    sides = [tuple(weight_out_in(p.module).shape) for p in projections]
    lora = sum(3 * (n_out + n_in) for n_out, n_in in sides)
    assert counts == {
        **dict.fromkeys(("lora", "lora+", "pissa", "rslora"), lora),
        "dora": lora + sum(n_out for n_out, _ in sides),
        "adalora": sum(5 * (n_out + n_in + 1) for n_out, n_in in sides),  # 1.5 times 3, rounded up
        "full": sum(n_out * n_in for n_out, n_in in sides),
        "supertuning": sum(int(n_out * n_in * (1 - 0.9)) for n_out, n_in in sides),
    }


def test_rslora_scales_by_the_root_of_the_rank(make_model: MakeModel) -> None:
    layer: Any = next(iter(adapted_modules(started(make_model("llama"), "rslora").model).values()))
    assert layer.scaling["default"] == pytest.approx(6 / 3**0.5)


def test_supertuning_trains_the_largest_weights(make_model: MakeModel) -> None:
    adapted = started(make_model("llama"), "supertuning", sparsity=0.8)
    layers: list[Any] = list(adapted_modules(adapted.model).values())
    for layer in layers:
        magnitudes = layer.get_base_layer().weight.abs().flatten()
        chosen = magnitudes[layer.supertuning_indices["default"].long()]
        assert len(chosen) == int(len(magnitudes) * (1 - 0.8))
        assert float(chosen.min()) >= float(magnitudes.sort(descending=True)[0][len(chosen) - 1])


# What is saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [[0, 2], [0, 1, 2]])
@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_plain_peft_loads_it_on_the_original_weights(
    make_model: MakeModel,
    tmp_path: Path,
    method: str,
    model_type: str,
    layers: list[int],
    dtype: torch.dtype,
) -> None:
    def base() -> Any:
        model = make_model(model_type)
        return in_bfloat16(model) if dtype == torch.bfloat16 else model

    adapted = trained(base(), method, layers)
    before = logits_of(adapted.model)
    adapted.finish()
    finished = logits_of(adapted.model)
    if not (method == "pissa" and dtype == torch.bfloat16):
        torch.testing.assert_close(finished, before, rtol=0, atol=1e-5)
    assert (finished - logits_of(base())).abs().max() > 0.05
    n_bytes = save_adapter(adapted.model, tmp_path / "adapter", {"method": method})
    assert n_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_adapter(base(), tmp_path / "adapter")
    assert not any(p.requires_grad for p in ours.parameters())
    for loaded in (ours, plain_peft(base(), tmp_path / "adapter")):
        torch.testing.assert_close(logits_of(loaded), finished, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_it_does_not_fit_another_model(make_model: MakeModel, tmp_path: Path, method: str) -> None:
    adapted = trained(make_model("llama"), method)
    adapted.finish()
    save_adapter(adapted.model, tmp_path / "adapter", {})
    for other in (
        make_model("gpt2"),
        make_model("llama", intermediate_size=44),
        make_model("llama", num_hidden_layers=2),
    ):
        with pytest.raises(UserError, match="does not fit this model") as refused:
            load_adapter(other, tmp_path / "adapter")
        assert len(str(refused.value).splitlines()) == 1


# PiSSA


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_pissa_trains_the_principal_part(make_model: MakeModel, model_type: str) -> None:
    original = {p.full_name: weight_out_in(p.module) for p in _projections(make_model, model_type)}
    adapted = started(make_model(model_type), "pissa", [0, 1, 2])
    layers: dict[str, Any] = dict(adapted_modules(adapted.model))
    for name, layer in layers.items():
        weight = original[name.removeprefix("base_model.model.")]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        u, s, v = torch.linalg.svd(weight)
        principal = u[:, :3] * s[:3] @ v[:3]
        torch.testing.assert_close(6 / 3 * b @ a, principal, rtol=0, atol=1e-5)
        residual = weight_out_in(layer.get_base_layer())
        torch.testing.assert_close(residual, weight - principal, rtol=0, atol=1e-5)
        torch.testing.assert_close(a @ a.T, b.T @ b, rtol=0, atol=1e-5)  # halves of S in each


def _projections(make_model: MakeModel, model_type: str) -> list[Any]:
    return list(Anatomy(make_model(model_type)).all_projections())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_pissa_gives_the_original_weights_back(
    make_model: MakeModel, tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    model = make_model(model_type)
    cast_parameters(model, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = trained(model, "pissa")
    adapted.finish()
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in adapted.model.state_dict().items()
        if ".lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    save_adapter(adapted.model, tmp_path / "adapter", {})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (6, 12, True)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_pissa_in_bfloat16_differs_by_the_rounding_of_the_residual(
    make_model: MakeModel, model_type: str
) -> None:
    """What is saved is W + s (B A - B0 A0); what was trained is that and the rounding of W_res."""
    adapted = trained(in_bfloat16(make_model(model_type)), "pissa")

    layers: list[Any] = list(adapted_modules(adapted.model).values())

    @torch.no_grad()
    def frozen_and_sum(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        frozen = weight_out_in(layer.get_base_layer()).float()
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        return frozen, frozen + layer.scaling["default"] * update

    before = [frozen_and_sum(layer) for layer in layers]
    adapted.finish()
    for layer, (residual, trained_weight) in zip(layers, before, strict=True):
        off = (frozen_and_sum(layer)[1] - trained_weight).abs()
        assert float(off.max()) > 1e-4
        assert bool((off <= residual.abs() / 256 + 1e-5).all())


# Full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_full_saves_the_projections_under_the_models_names(
    make_model: MakeModel, tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    model = make_model(model_type)
    cast_parameters(model, dtype)
    expected = {
        f"base_model.model.{p.full_name}.{name}": tuple(parameter.shape)
        for p in Anatomy(model).all_projections()
        if p.layer in (0, 2)
        for name, parameter in p.module.named_parameters()
    }
    adapted = trained(model, "full")
    adapted.finish()
    save_adapter(adapted.model, tmp_path / "adapter", {})
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    merged = plain_peft(make_model(model_type), tmp_path / "adapter").merge_and_unload()
    name = next(iter(expected))
    found = merged.get_parameter(name.removeprefix("base_model.model."))
    assert torch.equal(found, saved[name].float())


def test_full_leaves_the_original_weights_beside(make_model: MakeModel) -> None:
    adapted = trained(make_model("gpt2"), "full")
    expected = logits_of(make_model("gpt2"))
    with adapted.model.disable_adapter():
        assert torch.equal(logits_of(adapted.model), expected)
    assert not torch.equal(logits_of(adapted.model), expected)


# AdaLoRA


def test_adalora_saves_the_ranks_that_are_left(make_model: MakeModel, tmp_path: Path) -> None:
    adapted = trained(make_model("llama"), "adalora", [1])
    generator = torch.Generator().manual_seed(4)
    for step in range(1, 21):
        for parameter in adapted.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        adapted.after_step(step)
    ranks = adapted.ranks
    assert ranks is not None and sum(ranks.values()) == 3 * 7
    logits = logits_of(adapted.model)
    adapted.finish()
    save_adapter(adapted.model, tmp_path / "adapter", {})
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, rank in ranks.items():
        prefix = f"base_model.model.{name}.lora_"
        sizes = [saved[f"{prefix}{part}"].shape[side] for part, side in (("A", 0), ("B", 1))]
        assert sizes == [rank, rank] and saved[f"{prefix}E"].shape == (rank, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_adapter(make_model("llama"), tmp_path / "adapter")
    for loaded in (
        ours,
        plain_peft(make_model("llama"), tmp_path / "adapter"),
    ):
        torch.testing.assert_close(logits_of(loaded), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_steps", [None, 0, 5])
def test_adalora_refuses_a_training_too_short_to_prune_in(
    make_model: MakeModel, n_steps: int | None
) -> None:
    with pytest.raises(UserError, match=f"at least 6 .* this training has {n_steps or 0}; raise"):
        adapt(make_model("llama"), adapter_spec("adalora"), [1], seed=0, n_steps=n_steps)
