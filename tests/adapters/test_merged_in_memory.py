"""An adapter in a model's weights: PEFT's logits meanwhile, and the model as it was afterwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.support.adapters import move

from swlora.adapters.merged_in_memory import (
    adapter_merged,
    check_mergeable,
    mergeable_folder,
)
from swlora.adapters.merged_weights import MergedWeights
from swlora.adapters.methods import adapt
from swlora.adapters.saved import WEIGHTS, load_adapter, save_adapter
from swlora.config import AdapterSpec
from swlora.errors import UserError

TOKENS = torch.tensor([[72, 105, 33, 10, 200], [1, 2, 3, 4, 5]])


@pytest.fixture
def saved(make_model, tmp_path):
    """A function (method, model type) -> the folder of an adapter with random weights."""

    def save(method: str, model_type: str = "llama"):
        model = make_model(model_type)
        adapted = adapt(model, AdapterSpec(method=method), [0, 2], seed=1, n_steps=9)
        move(adapted.parameters.values(), 0.1)
        adapted.finish()
        save_adapter(adapted.model, tmp_path / method, {})
        return tmp_path / method

    return save


def weights(model) -> dict[str, tuple[int, int, torch.Tensor]]:
    return {name: (id(p), p.data_ptr(), p.clone()) for name, p in model.named_parameters()}


def assert_same(before, model) -> None:
    after = weights(model)
    assert list(before) == list(after)
    for name, (*place, values) in before.items():
        assert place == list(after[name][:2]), name
        assert torch.equal(values, after[name][2]), name


@pytest.mark.parametrize(
    ("method", "model_type"),
    [("lora", "gpt2"), ("lora", "llama"), ("dora", "llama"), ("full", "gpt2"), ("pissa", "llama")],
)
def test_the_model_is_base_and_adapter_and_then_the_base(method, model_type, saved, make_model):
    folder, model = saved(method, model_type), make_model(model_type)
    before, logits = weights(model), model(input_ids=TOKENS).logits
    expected = load_adapter(make_model(model_type), folder)(input_ids=TOKENS).logits
    modules = list(model.modules())
    with adapter_merged(model, folder):
        found = model(input_ids=TOKENS).logits
        assert list(model.modules()) == modules
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits, rtol=1e-2, atol=1e-2)
    assert_same(before, model)


def test_an_error_in_the_body_leaves_nothing(saved, make_model):
    folder, model = saved("lora"), make_model("llama")
    before = weights(model)
    with pytest.raises(KeyboardInterrupt), adapter_merged(model, folder):
        raise KeyboardInterrupt
    assert_same(before, model)


@pytest.mark.parametrize("method", ["lora", "pissa", "full"])
def test_whether_it_fits_is_known_without_computing_anything(
    method, saved, make_model, monkeypatch
):
    folder = saved(method)
    monkeypatch.setattr(MergedWeights, "merged", lambda *_: pytest.fail("it was merged"))
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("it was decomposed"))
    check_mergeable(make_model("llama"), folder)


def test_an_adapter_that_does_not_fit_leaves_nothing(saved, make_model):
    folder, model = saved("lora"), make_model("llama", intermediate_size=44)
    before = weights(model)
    with pytest.raises(UserError, match="another model"), adapter_merged(model, folder):
        pass
    with pytest.raises(UserError, match="another model"):
        check_mergeable(model, folder)
    assert_same(before, model)


def test_numbers_that_are_not_finite_are_seen_before_anything_is_computed(saved, make_model):
    folder = saved("lora")
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match="holds numbers that are not finite, 1 in "):
        check_mergeable(make_model("llama"), folder)


def test_what_embeddings_and_head_share_is_not_changed(make_model, tmp_path):
    model = make_model("gpt2")
    config = LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False)
    get_peft_model(make_model("gpt2"), config).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    before = weights(model)
    with pytest.raises(UserError, match="head share"), adapter_merged(model, tmp_path):
        pass
    with pytest.raises(UserError, match="head share"):
        check_mergeable(model, tmp_path)
    assert_same(before, model)


def test_what_cannot_be_merged_is_known_from_its_files(make_model, tmp_path):
    with pytest.raises(UserError, match="there is no adapter folder"):
        mergeable_folder(tmp_path / "gone")
    config = LoraConfig(r=2, init_lora_weights="olora", target_modules=["q_proj"])
    get_peft_model(make_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be merged: its start"):
        mergeable_folder(tmp_path)
