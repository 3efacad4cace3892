"""A config.json that describes more than the weights beside it hold: one line, before any room."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swlora.config import ModelSpec
from swlora.errors import UserError
from swlora.models.declared_size import check_declared_size
from swlora.models.load import load_model, load_skeleton

FAMILIES = ("llama", "gpt2", "opt", "gemma2", "mixtral", "qwen3_moe", "gpt_neox", "falcon", "phi3")


@pytest.fixture
def folder(model_folder, tmp_path):
    """A function model_type, changes -> a copy of that model whose config.json says otherwise."""

    def changed(model_type: str, **changes: object) -> Path:
        path = Path(shutil.copytree(model_folder(model_type), tmp_path / "copy"))
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        return path

    return changed


def refusal(folder: Path, load=load_model) -> str:
    with pytest.raises(UserError) as refused:
        load(ModelSpec(name=str(folder), dtype="float32"))
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_whole_model_is_taken(model_type, model_folder):
    check_declared_size(model_folder(model_type))


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("llama", {"vocab_size": 1 << 24}, "lm_head.weight 16,777,216 x 24"),
        ("llama", {"intermediate_size": 1 << 20}, "mlp.down_proj.weight 24 x 1,048,576"),
        ("llama", {"num_key_value_heads": 1, "head_dim": 1 << 20}, "k_proj.weight 1,048,576 x 24"),
        ("gpt2", {"n_positions": 1 << 24}, "wpe.weight 16,777,216 x 24"),
        ("mixtral", {"num_local_experts": 1 << 14}, "mlp.gate.weight 16,384 x 24"),
        ("opt", {"max_position_embeddings": 1 << 24}, "embed_positions.weight 16,777,218 x"),
    ],
)
def test_a_size_that_the_weights_have_not(model_type, changes, expected, folder):
    changed = folder(model_type, **changes)
    said = refusal(changed)
    assert f"{changed} cannot be loaded: its config.json makes " in said
    assert expected in said


def test_more_layers_than_the_weights_have(folder):
    changed = folder("llama", num_hidden_layers=300)
    said = refusal(changed)
    assert f"{changed} cannot be loaded: its config.json describes " in said
    assert " numbers in 300 layers, and the weights beside it are " in said


def test_packed_weights_may_stand_for_more_numbers(folder):
    path = folder("llama", quantization_config={"quant_method": "of_somebody"})
    weights = load_file(path / "model.safetensors")
    packed = {name: w.flatten()[: w.numel() // 8].clone() for name, w in weights.items()}
    save_file(packed, path / "model.safetensors")
    check_declared_size(path)
    less = {name: w.new_zeros(1, dtype=torch.int32) for name, w in packed.items()}
    save_file(less, path / "model.safetensors")
    with pytest.raises(UserError, match=r"describes [\d,]+ numbers in 3 layers"):
        check_declared_size(path)


@pytest.mark.parametrize("load", [load_model, load_skeleton])
def test_numbers_of_which_no_model_can_be_made(load, folder):
    changed = folder("llama", hidden_act="none such")
    assert f"config.json of {changed} describes no model: " in refusal(changed, load)
