"""Packed and stacked products against the modules they replace."""

import copy
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.support.adapters import adapter_spec, attach, move
from tests.support.models import MakeModel
from torch import Tensor, nn

from swlora import memory
from swlora.adapters.methods import METHODS, adapt
from swlora.config import AdapterSpec
from swlora.decoding import forwards
from swlora.decoding.batch import BatchDecoder, DecodeRequest
from swlora.decoding.forwards import decode_forwards
from swlora.kernels.linear import packed_weight
from swlora.kernels.patched_forwards import patched_forwards
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.superweights.ablate import zeroed

TOKENS = torch.tensor([[72, 105, 33, 10, 200, 7, 7], [1, 2, 3, 4, 5, 6, 9]])
CASES = [
    (method, model_type)
    for method in METHODS
    for model_type in ("gpt2", "llama", "phi3")
    if not (METHODS[method].linear_only and model_type == "gpt2")
]


@torch.inference_mode()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits.clone()  # type: ignore[no-any-return]


def fast_logits(model: Any, forwards: Mapping[nn.Module, Any] | None = None) -> Tensor:
    with patched_forwards(forwards or decode_forwards(model)):
        return logits(model)


def adapted(make_model: MakeModel, method: str, model_type: str, **changes: Any) -> Any:
    """A PeftModel with every trained number moved, as by some training; layer 1 has no adapter."""
    spec = adapter_spec(method, **changes)
    adapted = adapt(make_model(model_type), spec, [0, 2], seed=1, n_steps=20)
    move(adapted.parameters.values(), 0.2)
    return adapted.model.eval()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The widths of all packed products of the body."""
    widths: list[int] = []
    product = forwards._StackedMaps.product

    def counting(self: Any, x: Tensor) -> Tensor:
        y = product(self, x)
        widths.append(y.shape[-1])
        return y

    with monkeypatch.context() as patch:
        patch.setattr(forwards._StackedMaps, "product", counting)
        yield widths


@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_every_adapter_computes_what_it_did(
    method: str, model_type: str, make_model: MakeModel
) -> None:
    model = adapted(make_model, method, model_type)
    expected = logits(model)
    torch.testing.assert_close(fast_logits(model), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(fast_logits(model.get_base_model()), expected, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(expected, logits(make_model(model_type)), atol=1e-2)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "up_proj", "o_proj"]])
def test_maps_of_one_input_need_not_all_be_adapted(
    targets: list[str], make_model: MakeModel
) -> None:
    model = adapted(make_model, "lora", "llama", targets=targets)
    torch.testing.assert_close(fast_logits(model), logits(model), atol=2e-4, rtol=1e-4)


def test_maps_of_one_input_are_one_product(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(make_model("llama"), AdapterSpec(rank=3), [0, 2], seed=0)
    with counted(monkeypatch) as widths:
        fast_logits(model)
    assert widths == [*[32 + 16 + 16, 24, 40 + 40, 24] * 3, 264]
    with counted(monkeypatch) as widths, model.disable_adapter():
        fast_logits(model)
    assert len(widths) == 13


@pytest.mark.parametrize("shape", [{"attention_bias": True, "mlp_bias": True}, {}])
def test_biases_are_added(shape: dict[str, Any], make_model: MakeModel) -> None:
    model = make_model("llama", **shape)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape)
    torch.testing.assert_close(fast_logits(model), logits(model), atol=2e-4, rtol=1e-4)


def test_an_adapter_that_is_switched_off_is_not_there(make_model: MakeModel) -> None:
    model = adapted(make_model, "lora", "llama")
    with model.disable_adapter():
        forwards = decode_forwards(model.get_base_model())
        expected = logits(model)
        torch.testing.assert_close(fast_logits(model, forwards), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(expected, logits(make_model("llama")), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", ["mlp.down_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_a_weight_that_changes_counts_at_once(module: str, make_model: MakeModel) -> None:
    model = make_model("llama")
    forwards = decode_forwards(model)
    before = fast_logits(model, forwards)
    with zeroed(Anatomy(model), [WeightAddress(1, module, c, 3) for c in range(16)]):
        changed = logits(model)
        torch.testing.assert_close(fast_logits(model, forwards), changed, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(changed, before, atol=1e-2)
    assert torch.equal(fast_logits(model, forwards), before)
    model.half().bfloat16()  # another tensor, of another dtype
    forwards = decode_forwards(model)
    assert fast_logits(model, forwards).dtype == torch.bfloat16


@pytest.mark.parametrize("n_rows", [1, 3, 64])
def test_products_in_bf16_are_rounded_once(n_rows: int, make_model: MakeModel) -> None:
    """Against float64: one rounding of the map's product, one of the adapter's, one of the sum."""
    model = adapted(make_model, "lora", "llama").bfloat16()
    projections = [p.module for p in Anatomy(model.get_base_model()).projections(0)]
    generator = torch.Generator().manual_seed(3)
    with patched_forwards(decode_forwards(model)), torch.inference_mode():
        found = {}
        for width in (24, 32, 40):  # what q, k, v and gate, up read; o; down
            x = torch.randn(n_rows, width, generator=generator).bfloat16()
            found |= {m: (x, m(x)) for m in projections if m.in_features == width}
    for module, (x, y) in found.items():
        base, a, b = (
            m.weight.double()
            for m in (module.base_layer, module.lora_A["default"], module.lora_B["default"])
        )
        update = x.double() @ a.t() @ b.t() * module.scaling["default"]
        wanted = x.double() @ base.t() + update
        error = (y.double() - wanted).norm() / (wanted.norm() + update.norm())
        assert float(error.detach()) < 2**-8


def test_bf16_is_as_close_to_float64_as_torch_is(make_model: MakeModel) -> None:
    exact = adapted(make_model, "lora", "llama").double()
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())  # the same numbers, in float64
    tokens = torch.randint(0, 250, (90, 5), generator=torch.Generator().manual_seed(3))
    wanted, plain = logits(exact, tokens), logits(model, tokens)
    with patched_forwards(decode_forwards(model)):
        fast = logits(model, tokens)
    errors = [float((found.double() - wanted).norm()) for found in (fast, plain)]
    assert errors[0] <= 1.15 * errors[1]


def test_copies_stay_within_the_limit(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    head_bytes = model.lm_head.weight.nbytes
    gc.collect()
    limit = packed_weight.held_bytes() + head_bytes + 100
    monkeypatch.setattr(memory, "_asked_bytes", limit)
    with counted(monkeypatch) as widths:
        found = fast_logits(model)
    assert widths == [264]
    torch.testing.assert_close(found, logits(model), atol=2e-4, rtol=1e-4)


def test_copies_are_shared_and_go_with_their_use(make_model: MakeModel) -> None:
    model = make_model("llama")
    gc.collect()
    n_before, held_before = len(packed_weight._HELD), packed_weight.held_bytes()
    first, second = decode_forwards(model), decode_forwards(model)
    assert len(packed_weight._HELD) == n_before + 13
    maps = [model.lm_head, *(p.module for p in Anatomy(model).all_projections())]
    assert packed_weight.held_bytes() - held_before == sum(m.weight.nbytes for m in maps)
    fast_logits(model, first)
    weight = packed_weight.packed_weight([model.lm_head])
    assert weight is not None
    packed = weight.tensor()
    fast_logits(model, second)
    assert weight.tensor() is packed
    del first, weight, packed
    assert len(packed_weight._HELD) == n_before + 13
    del second
    assert (len(packed_weight._HELD), packed_weight.held_bytes()) == (n_before, held_before)


def test_a_decoder_keeps_the_variant_it_was_made_for(make_model: MakeModel) -> None:
    """The texts of the base model, also when adapters are put into the model afterwards."""
    model = make_model("llama")
    batch = BatchDecoder(model, eos_token_ids=[], max_slots=1)

    def text(decoder: BatchDecoder) -> list[int]:
        decoder.admit([DecodeRequest(0, [5, 6, 7], 12)])
        return [event.token_id for _ in range(12) for event in decoder.step()]

    before = text(batch)
    peft_model = attach(model, AdapterSpec(rank=3), [0, 1, 2], seed=0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    other = BatchDecoder(model, eos_token_ids=[], max_slots=1)
    assert text(other) != before
    with peft_model.disable_adapter():
        assert text(batch) == before
