"""The fast LoRA forward against PEFT's own, layer by layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swlora.adapters.methods import trainable_parameters
from swlora.kernels.lora import lora_forwards
from swlora.kernels.patched_forwards import patched_forwards

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]

N_IN = 7
N_OUT = {"with_bias": 11, "no_bias": 5, "conv1d": 9}


class Projections(nn.Module):
    """One of each kind of linear map, from 7 channels to another number."""

    def __init__(self) -> None:
        super().__init__()
        self.with_bias = nn.Linear(N_IN, N_OUT["with_bias"])
        self.no_bias = nn.Linear(N_IN, N_OUT["no_bias"], bias=False)
        self.conv1d = Conv1D(N_OUT["conv1d"], N_IN)
        nn.init.normal_(self.conv1d.weight)
        nn.init.normal_(self.conv1d.bias)
        self.embedding = nn.Embedding(13, N_IN)


def make(
    dtype: torch.dtype = torch.float32,
    names: Any = tuple(N_OUT),
    kind: Callable[..., Any] = LoraConfig,
    **config: Any,
) -> Any:
    """A PeftModel around `Projections` with a B as large as A."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = {"r": 3, "lora_alpha": 7, "target_modules": list(names)} | config
        model = get_peft_model(Projections().to(dtype), kind(**config))
        for parameter_name, parameter in model.named_parameters():
            if "ranknum" in parameter_name:  # a constant, though PEFT may set it free
                parameter.requires_grad_(False)
        for parameter in trainable_parameters(model).values():
            nn.init.normal_(parameter, std=0.5)
    return model.train()


def layer_of(model: Any, name: str) -> Any:
    return model.base_model.model.get_submodule(name)


def make_input(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 5, N_IN)) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator).to(dtype)


def measured(layer: Any, x: Tensor, *, clamp: float | None = None) -> dict[str, Tensor]:
    """Output and every gradient of a layer, for a loss that is no plain sum; seed 3."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    if clamp is not None:
        y.clamp_(-clamp, clamp)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    assert x.grad is not None
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


def is_covered(model: Any, name: str) -> bool:
    with patched_forwards(lora_forwards(model)):
        return "forward" in vars(layer_of(model, name))


def assert_fast_equals_peft(
    model: Any, name: str, x: Tensor, *, clamp: float | None = None, tolerance: float = 1e-6
) -> None:
    layer = layer_of(model, name)
    expected = measured(layer, x, clamp=clamp)
    with patched_forwards(lora_forwards(model)):
        assert "forward" in vars(layer)
        found = measured(layer, x, clamp=clamp)
    assert found.keys() == expected.keys()
    assert {key for key in found if "lora" in key} == {
        key for key, parameter in layer.named_parameters() if parameter.requires_grad
    }
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape
        error = (found[key] - value).norm() / value.norm()
        assert float(error) < tolerance, f"{key}: relative error {float(error):.1e}"


def adalora(**config: Any) -> AdaLoraConfig:
    """A rank of 3 at the start, as the others have."""
    del config["r"]
    return AdaLoraConfig(init_r=3, target_r=2, total_step=9, tinit=1, tfinal=1, **config)


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "adalora": {"kind": adalora},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str
)
@pytest.mark.parametrize("name", N_OUT)
def test_equals_peft(name: str, dtype: torch.dtype, tolerance: float, variant: str) -> None:
    model = make(dtype, **VARIANTS[variant]).to(dtype)
    assert_fast_equals_peft(model, name, make_input(dtype), tolerance=tolerance)
    assert len([p for p in layer_of(model, name).parameters() if p.requires_grad]) == (
        3 if variant in ("dora", "adalora") else 2
    )


@pytest.mark.parametrize("variant", ["dora", "adalora"])
@pytest.mark.parametrize("name", N_OUT)
def test_variants_without_a_graph(name: str, variant: str) -> None:
    model, x = make(**VARIANTS[variant]), make_input()
    layer = layer_of(model, name)
    with torch.no_grad():
        expected = layer(x)
        with patched_forwards(lora_forwards(model)):
            torch.testing.assert_close(layer(x), expected)
            torch.testing.assert_close(layer(x[:1, :1]), expected[:1, :1])


def test_adalora_with_a_matrix_that_lost_all_its_ranks() -> None:
    model = make(names=["no_bias"], kind=adalora)
    mask = {"no_bias.lora_E.default": [False] * 3}
    model.base_model.resize_modules_by_rank_pattern(mask, "default")
    layer, x = layer_of(model, "no_bias"), make_input()
    assert is_covered(model, "no_bias")
    with patched_forwards(lora_forwards(model)):
        assert torch.equal(layer(x), layer.base_layer(x))
        with torch.no_grad():
            assert torch.equal(layer(x), layer.base_layer(x))


def test_the_norms_of_dora_follow_the_weights() -> None:
    """They are constant for as long as the fast forward is in place, and no longer."""
    model, x = make(use_dora=True), make_input()
    layer = layer_of(model, "with_bias")
    for _ in range(2):
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(3)
        expected = layer(x)
        with patched_forwards(lora_forwards(model)):
            torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("shape", [(N_IN,), (1, N_IN), (6, N_IN), (1, 1, N_IN), (2, 3, 4, N_IN)])
@pytest.mark.parametrize("name", N_OUT)
def test_inputs_of_any_shape(name: str, shape: tuple[int, ...]) -> None:
    assert_fast_equals_peft(make(), name, make_input(shape=shape))


@pytest.mark.parametrize("name", N_OUT)
def test_an_input_that_does_not_lie_in_one_piece(name: str) -> None:
    x = make_input(shape=(4, N_IN, 3)).transpose(1, 2)
    assert not x.is_contiguous()
    model = make()
    layer = layer_of(model, name)
    expected = layer(x.contiguous())  # Conv1D itself takes nothing else
    with patched_forwards(lora_forwards(model)):
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", N_OUT)
def test_an_output_that_is_changed_in_place(name: str) -> None:
    assert_fast_equals_peft(make(), name, make_input(), clamp=0.8)  # as OLMo clips its queries


@pytest.mark.parametrize("name", N_OUT)
def test_an_input_without_gradient(name: str) -> None:
    model, x = make(), make_input()
    layer = layer_of(model, name)
    expected = measured(layer, x)
    layer.zero_grad(set_to_none=True)
    with patched_forwards(lora_forwards(model)):
        y = layer(x)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        (y * weights).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected["y"])
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.get(key))


@pytest.mark.parametrize("name", N_OUT)
def test_gradients_add_up(name: str) -> None:
    model, x = make(), make_input()
    layer = layer_of(model, name)
    with patched_forwards(lora_forwards(model)):
        once = measured(layer, x)
        layer(x).sum().backward()
    both = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer(x).sum().backward()
    for key, gradient in both.items():
        torch.testing.assert_close(gradient - once[key], layer.get_parameter(key).grad)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", N_OUT)
def test_bfloat16_with_float32_adapters(name: str, variant: str) -> None:
    model = make(torch.bfloat16, **VARIANTS[variant])
    layer = layer_of(model, name)
    x = make_input(torch.bfloat16, (40, N_IN))
    with patched_forwards(lora_forwards(model)):
        found = measured(layer, x)
    assert {value.dtype for key, value in found.items() if "lora" in key} == {torch.float32}
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    truth = measured(layer_of(model.double(), name), x.double())
    for key, value in truth.items():
        assert float((found[key] - value).norm() / value.norm()) < 1e-2


@pytest.mark.parametrize("name", N_OUT)
def test_dropout_draws_what_peft_draws(name: str) -> None:
    model = make(lora_dropout=0.4)
    assert_fast_equals_peft(model, name, make_input())
    layer, x = layer_of(model, name), make_input()
    dropped = measured(layer, x)
    model.eval()
    assert_fast_equals_peft(model, name, x)
    assert not torch.equal(dropped["y"], measured(layer, x)["y"])


def test_dropout_keeps_the_mean() -> None:
    model = make(lora_dropout=0.4)
    layer = layer_of(model, "no_bias")
    x = make_input(shape=(1, N_IN))
    torch.manual_seed(0)
    with torch.no_grad():
        with patched_forwards(lora_forwards(model)):
            mean = layer(x.expand(40_000, N_IN)).mean(0)
        expected = layer_of(model.eval(), "no_bias")(x)[0]
        without_adapter = layer.base_layer(x)[0]
    assert float((mean - expected).norm()) < 0.02 * float((expected - without_adapter).norm())


def test_every_forward_is_given_back_bit_for_bit() -> None:
    model, x = make(), make_input()
    layers = [layer_of(model, name) for name in N_OUT]
    before = [layer(x) for layer in layers]
    with patched_forwards(lora_forwards(model)):
        assert all("forward" in vars(layer) for layer in layers)
    with pytest.raises(ZeroDivisionError), patched_forwards(lora_forwards(model)):
        raise ZeroDivisionError
    for layer, expected in zip(layers, before, strict=True):
        assert "forward" not in vars(layer)
        assert torch.equal(layer(x), expected)


def assert_left_alone(model: Any, name: str, x: Tensor) -> None:
    layer = layer_of(model, name)
    expected = layer(x)
    with patched_forwards(lora_forwards(model)):
        assert "forward" not in vars(layer)
        torch.testing.assert_close(layer(x), expected)


def test_dora_with_dropout_is_left_alone() -> None:
    """PEFT then drops the input of the frozen map, too."""
    model, x = make(use_dora=True, lora_dropout=0.4), make_input()
    assert not is_covered(model, "with_bias")
    model.eval()
    assert_fast_equals_peft(model, "with_bias", x)


def test_adalora_whose_first_rank_is_trained_is_left_alone() -> None:
    model = make(names=["no_bias"], kind=adalora)
    layer_of(model, "no_bias").ranknum["default"].requires_grad_(True)
    assert_left_alone(model, "no_bias", make_input())


def test_biases_of_an_adapter_are_left_alone() -> None:
    assert_left_alone(make(lora_bias=True, names=["no_bias"]), "no_bias", make_input())


def test_embeddings_are_left_alone() -> None:
    assert_left_alone(make(names=["embedding"]), "embedding", torch.tensor([3, 1, 3]))


def test_trained_biases_are_left_alone() -> None:
    model = make(bias="all", names=["with_bias"])
    layer, x = layer_of(model, "with_bias"), make_input()
    assert_left_alone(model, "with_bias", x)
    with patched_forwards(lora_forwards(model)):
        assert "base_layer.bias" in measured(layer, x)


def test_two_adapters_at_once_are_left_alone() -> None:
    model = make(names=["with_bias"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["with_bias"]))
    assert is_covered(model, "with_bias")
    model.base_model.set_adapter(["default", "second"])
    assert_left_alone(model, "with_bias", make_input())


def test_the_active_one_of_two_adapters_is_used() -> None:
    model = make(names=["with_bias"])
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["with_bias"]))
    model.set_adapter("second")
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter)
    assert_fast_equals_peft(model, "with_bias", make_input())


def test_disabled_and_merged_adapters_are_left_alone() -> None:
    model, x = make(), make_input()
    layer = layer_of(model, "no_bias")
    with model.disable_adapter():
        assert_left_alone(model, "no_bias", x)
        assert torch.equal(layer(x), layer.base_layer(x))
    adapted = layer(x)
    model.merge_adapter()
    assert_left_alone(model, "no_bias", x)
    torch.testing.assert_close(layer(x), adapted)
    model.unmerge_adapter()
    assert is_covered(model, "no_bias")


def test_a_model_without_adapters_runs_as_it_is() -> None:
    model, x = Projections(), make_input()
    expected = model.with_bias(x)
    with patched_forwards(lora_forwards(model)):
        assert torch.equal(model.with_bias(x), expected)


def test_a_frozen_map_without_an_adapter_has_the_same_products() -> None:
    model = Projections().requires_grad_(False)
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        n_in = module.in_features if isinstance(module, torch.nn.Linear) else module.nx
        x = torch.randn(2, 3, n_in, requires_grad=True)
        expected = module(x)
        (gradient,) = torch.autograd.grad(expected.square().sum(), x)
        with patched_forwards(lora_forwards(model)):
            found = module(x)
            (fast_gradient,) = torch.autograd.grad(found.square().sum(), x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(fast_gradient, gradient)


def test_a_weight_written_through_data_counts_in_the_next_body() -> None:
    """PEFT merges so; such a write changes neither the tensor's address nor its version."""
    model, x = make(), make_input().requires_grad_()
    layer = layer_of(model, "no_bias")
    for _ in range(2):
        weight = layer.base_layer.weight
        weight.data.mul_(-1.5)
        x.grad = None
        with patched_forwards(lora_forwards(model)):
            fast = layer(x)
            fast.sum().backward()
        assert x.grad is not None
        expected = layer(x.detach())
        torch.testing.assert_close(fast, expected)
        gradient, x.grad = x.grad, None
        layer(x).sum().backward()
        torch.testing.assert_close(gradient, x.grad)
