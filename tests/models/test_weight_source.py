"""Weights read from files: those of transformers' state dict, and nothing outside a folder."""

import json
import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swlora.errors import UserError
from swlora.memory import release_pages
from swlora.models.weight_source import INDEX, SINGLE, open_weights


@pytest.fixture
def copy_of(model_folder, tmp_path):
    """A function model_type -> a copy of its folder that may be changed."""

    def copied(model_type: str) -> Path:
        return Path(shutil.copytree(model_folder(model_type), tmp_path / "copy"))

    return copied


@pytest.fixture
def sharded(model_folder, tmp_path):
    """A folder of a tiny Llama in several shards."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        open_weights(path)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def test_experts_keep_the_names_of_the_file(model_folder):
    folder = model_folder("mixtral")
    weights = open_weights(folder)
    experts = {name for name in load_file(folder / SINGLE) if ".experts." in name}
    assert experts and experts < set(weights.names)
    assert "model.layers.0.mlp.gate.weight" in weights.names  # in the file: block_sparse_moe


def assert_same_weights(path: Path, model) -> None:
    weights, expected = open_weights(path), dict(model.named_parameters())
    assert sorted(weights.names) == sorted(expected)
    for name in weights.names:
        assert torch.equal(weights.tensor(name), expected[name])
        assert weights.shape(name) == tuple(expected[name].shape)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "gpt_neox", "opt"])
def test_a_folder_has_the_names_and_numbers_of_the_state_dict(model_folder, model_type):
    folder = model_folder(model_type)
    assert_same_weights(folder, AutoModelForCausalLM.from_pretrained(folder))


def test_shards_are_files(sharded):
    assert_same_weights(sharded, AutoModelForCausalLM.from_pretrained(sharded))
    weights, files = open_weights(sharded), sorted(sharded.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(map(sorted, weights.shards())) == sorted(sorted(load_file(f)) for f in files)


def test_names_without_the_backbone_get_it(copy_of):
    folder = copy_of("gpt2")  # as openai-community/gpt2 on the Hub
    tensors = load_file(folder / SINGLE)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, folder / SINGLE)
    assert_same_weights(folder, AutoModelForCausalLM.from_pretrained(folder))


def test_tensors_keep_the_dtype_of_the_file_and_are_not_copied(make_model, tmp_path):
    make_model("llama").bfloat16().save_pretrained(tmp_path)
    name, weights = "model.layers.1.mlp.up_proj.weight", open_weights(tmp_path)
    assert weights.tensor(name).dtype == torch.bfloat16
    assert weights.tensor(name).data_ptr() == weights.tensor(name).data_ptr()


def test_pages_that_were_given_back_are_read_again(tmp_path):
    values = torch.randn(2048, 2048)
    save_file({"w": values}, tmp_path / SINGLE)
    mapped, process = open_weights(tmp_path).tensor("w"), psutil.Process()
    assert torch.equal(mapped, values)
    before = process.memory_info().rss
    release_pages([mapped, values])
    if sys.platform.startswith("linux"):
        assert before - process.memory_info().rss > 0.9 * values.nbytes
    assert torch.equal(mapped, values)  # and what is no file's was left alone


@pytest.mark.parametrize(
    "file_name",
    ["../other.safetensors", "/etc/passwd", "deep/w.safetensors", "w.bin", "..\\w.safetensors", 7],
)
def test_an_index_reaches_no_file_elsewhere(sharded, tmp_path, file_name):
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = file_name
    (sharded / INDEX).write_text(json.dumps(index))
    assert "no safetensors file beside it" in refusal(sharded)


def test_a_shard_must_be_a_regular_file(sharded):
    shard = next(sharded.glob("*.safetensors"))
    shard.unlink()
    assert f"lacks {shard.name}" in refusal(sharded)
    os.mkfifo(shard)  # to open it would wait for ever
    assert f"lacks {shard.name}" in refusal(sharded)


def test_a_shard_that_is_cut_off_is_named(sharded):
    shard = max(sharded.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert f"{shard.name} cannot be read as safetensors" in refusal(sharded)


def test_an_index_and_its_shards_must_agree(sharded):
    shard = max(sharded.glob("*.safetensors"))
    tensors = load_file(shard)
    name, tensor = tensors.popitem()
    save_file(tensors | {"another": tensor}, shard)
    assert f"lacks {name}" in refusal(sharded)
    other = min(sharded.glob("*.safetensors"))
    save_file(load_file(other) | {name: tensor}, other)
    save_file(tensors | {name: tensor}, shard)
    assert f"{name} lies in two files" in refusal(sharded)


NO_INDEX = ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "[" * 9999]


@pytest.mark.parametrize("text", NO_INDEX)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    assert INDEX in refusal(tmp_path)


def test_other_formats_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "other formats are not read" in refusal(tmp_path)
    assert "there is no model folder" in refusal(tmp_path / "absent")
