"""The fused norms and gated activations against the modules of transformers that they replace."""

from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.support.models import MakeModel
from torch import Tensor, nn

from swlora.kernels.fused import fused_forwards
from swlora.kernels.patched_forwards import patched_forwards
from swlora.models.anatomy import FAMILIES, RMS_NORMS, SWIGLU_MLPS

FAMILIES_BY_TYPE = {t: f for f in FAMILIES for t in f.model_types}
CLASS_NAMES = sorted(RMS_NORMS | SWIGLU_MLPS)


class Part(NamedTuple):
    """One module and the model that it belongs to."""

    model: Any
    module: nn.Module


def parts(make_model: MakeModel, class_name: str, **changes: Any) -> list[Part]:
    """Modules of the class in the tiny models of all families, one a shape of its weights."""
    found: dict[Any, Part] = {}
    for model_type in FAMILIES_BY_TYPE:
        if model_type.removesuffix("_text") not in class_name.lower():
            continue
        model = make_model(model_type, **changes)
        for module in model.modules():
            if type(module).__name__ == class_name:
                key = (model_type, *(tuple(p.shape) for p in module.parameters()))
                found.setdefault(key, Part(model, module))
    for _, module in found.values():
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return list(found.values())


def width_of(module: Any) -> int:
    return int(module.gate_proj.in_features if hasattr(module, "gate_proj") else len(module.weight))


def measured(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of the input for a loss that is no plain sum."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y * weights.to(y.dtype)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def fused(part: Part, x: Tensor) -> tuple[Tensor, Tensor]:
    with patched_forwards(fused_forwards(part.model)):
        assert "forward" in vars(part.module), f"{type(part.module).__name__} is not replaced"
        return measured(part.module, x)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_equal_in_float32(make_model: MakeModel, class_name: str, scale: float) -> None:
    found_parts = parts(make_model, class_name)
    assert found_parts, f"no family has a {class_name}"
    for part in found_parts:
        x = scale * torch.randn(2, 5, width_of(part.module))
        for found, expected in zip(fused(part, x), measured(part.module, x), strict=True):
            assert found.dtype == torch.float32 and found.shape == expected.shape
            assert error(found, expected) < 1e-6


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_bfloat16_is_as_close_to_the_truth(make_model: MakeModel, class_name: str) -> None:
    for part in parts(make_model, class_name):
        part.model.to(torch.bfloat16)
        x = torch.randn(400, width_of(part.module)).to(torch.bfloat16)
        ours, originals = fused(part, x), measured(part.module, x)
        truth = measured(part.module.float(), x.float())
        for found, original, true in zip(ours, originals, truth, strict=True):
            assert found.dtype == torch.bfloat16
            assert error(found, true) <= 1.5 * error(original, true)


@pytest.mark.parametrize("class_name", sorted(RMS_NORMS))
def test_rows_of_a_norm_that_are_zero_or_huge(make_model: MakeModel, class_name: str) -> None:
    for part in parts(make_model, class_name):
        x = torch.randn(3, width_of(part.module))
        x[0], x[1, 0] = 0.0, 1e6
        for found, expected in zip(fused(part, x), measured(part.module, x), strict=True):
            assert bool(found.isfinite().all())
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("class_name", sorted(SWIGLU_MLPS))
def test_gates_that_are_far_from_zero(make_model: MakeModel, class_name: str) -> None:
    for part in parts(make_model, class_name):
        x = 1e3 * torch.randn(6, width_of(part.module))
        for found, expected in zip(fused(part, x), measured(part.module, x), strict=True):
            assert bool(found.isfinite().all())
            torch.testing.assert_close(found, expected)


def test_a_norm_over_heads_that_does_not_lie_in_one_piece(make_model: MakeModel) -> None:
    model = make_model("qwen3")
    part = Part(model, model.model.layers[0].self_attn.q_norm)
    x = torch.randn(2, 4, 5, width_of(part.module)).transpose(1, 2)
    assert not x.is_contiguous()
    for found, expected in zip(fused(part, x), measured(part.module, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_activations_keep_their_forward(make_model: MakeModel, activation: str) -> None:
    ((model, mlp),) = parts(make_model, "LlamaMLP", hidden_act=activation)
    x = torch.randn(5, width_of(mlp))
    expected = measured(mlp, x)
    with patched_forwards(fused_forwards(model)):
        found = measured(mlp, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["model.norm", "model.layers.0.mlp", "lm_head"])
def test_a_part_that_is_trained_gets_its_gradients(make_model: MakeModel, name: str) -> None:
    model = make_model("llama")
    module = model.get_submodule(name).requires_grad_()
    x = torch.randn(2, 5, 24)
    measured(module, x)
    expected = {key: parameter.grad for key, parameter in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    with patched_forwards(fused_forwards(model)):
        measured(module, x)
    for key, parameter in module.named_parameters():
        assert expected[key] is not None
        torch.testing.assert_close(parameter.grad, expected[key])


def test_a_head_computes_the_same_from_a_slice(make_model: MakeModel) -> None:
    model = make_model("llama")
    hidden = torch.randn(3, 5, 24)[:, -1:]
    assert not hidden.is_contiguous()
    expected = model.lm_head(hidden)
    with patched_forwards(fused_forwards(model)):
        torch.testing.assert_close(model.lm_head(hidden), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_head_with_an_adapter_keeps_its_forward(make_model: MakeModel) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(make_model("llama", tie_word_embeddings=False), config).eval()
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        expected = model(ids).logits
        with patched_forwards(fused_forwards(model)):
            torch.testing.assert_close(model(ids).logits, expected)
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, expected)


@pytest.mark.parametrize("model_type", sorted(FAMILIES_BY_TYPE))
def test_a_whole_model_computes_the_same_and_is_given_back(
    make_model: MakeModel, model_type: str
) -> None:
    model = make_model(model_type)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    known = [m for m in model.modules() if type(m).__name__ in RMS_NORMS | SWIGLU_MLPS]
    with torch.no_grad():
        before = model(ids).logits
        with patched_forwards(fused_forwards(model)):
            replaced = [m for m in model.modules() if "forward" in vars(m)]
            inside = model(ids).logits
        after = model(ids).logits
    others = [m for m in replaced if m not in known and m is not model.get_output_embeddings()]
    assert set(known) <= set(replaced) and not others
    torch.testing.assert_close(inside, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(before, after)
    with pytest.raises(ZeroDivisionError), patched_forwards(fused_forwards(model)):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (2, 3, 24)])
def test_a_norm_for_inference_rounds_as_transformers_does(
    dtype: torch.dtype, shape: tuple[int, ...], make_model: MakeModel
) -> None:
    model = make_model("llama").requires_grad_(False).to(dtype)
    norm = model.model.norm
    nn.init.normal_(norm.weight)
    fast = fused_forwards(model)[norm]
    for scale in (1e-4, 1.0, 300.0):
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
        with torch.inference_mode():
            wanted = norm(x)
            torch.testing.assert_close(
                fast(x), wanted, rtol=1e-6 if dtype != torch.bfloat16 else 2**-7, atol=0
            )
            share_equal = (fast(x) == wanted).double().mean()
        assert dtype != torch.bfloat16 or share_equal > 0.9
