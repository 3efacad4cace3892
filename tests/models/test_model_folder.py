"""A model's folder that must not be handed to a library: one line, at once."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.support.adapters import attach

from swlora.adapters.saved import CONFIG, FACTS, WEIGHTS, adapter_folder, save_adapter
from swlora.config import AdapterSpec, ModelSpec
from swlora.errors import UserError
from swlora.models.load import check_model, load_model
from swlora.models.model_folder import COUNTS, check_model_folder

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "copy"))


def refusal(folder: Path, load=load_model) -> str:
    with pytest.raises(UserError) as refused:
        load(ModelSpec(name=str(folder), dtype="float32"))
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def shard(folder: Path, file_name: object) -> None:
    """Put an index in front of the weights."""
    (folder / "model.safetensors").rename(folder / SHARD)
    weight_map = {"model.norm.weight": file_name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "file_name",
    ["../other.safetensors", "/dev/zero", "sub/a.safetensors", "a.bin", "model.pkl", 3, None],
)
def test_an_index_names_safetensors_files_inside_the_folder_only(file_name, folder):
    shard(folder, file_name)
    (folder.parent / "other.safetensors").write_bytes((folder / SHARD).read_bytes())
    assert "which is no safetensors file beside it" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "a.txt"])
def test_a_pipe_is_not_waited_for(name, folder):
    path = folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert f"{path} is no regular file" in refusal(folder)
    assert str(path) in refusal(folder, check_model)


def test_links_of_other_programs_do_no_harm(folder):
    (folder / ".#config.json").symlink_to("mary@laptop.1234")  # as an editor locks a file
    assert load_model(ModelSpec(name=str(folder), dtype="float32")).model is not None


def test_an_adapter_beside_the_model_is_not_put_on_in_silence(folder, make_model, tmp_path):
    save_adapter(attach(make_model("llama"), AdapterSpec(rank=2), [1], seed=0), tmp_path / "a", {})
    shutil.copy(tmp_path / "a" / CONFIG, folder)
    shutil.copy(tmp_path / "a" / WEIGHTS, folder)
    assert "holds a model and an adapter" in refusal(folder)


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30, 1.5, "2", True, [2]])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_count_that_no_model_has(name, value, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    assert f"says {name} is" in refusal(folder, check_model)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 200 + "]" * 200, '{"hidden_size": 1e999}'])
def test_a_configuration_that_is_none(text, folder):
    (folder / "config.json").write_text(text)
    assert "config.json cannot be read: " in refusal(folder, check_model)


def test_every_family_has_counts_that_are_taken(model_folder):
    seen = set()
    for model_type in ("llama", "gpt2", "opt", "gemma2", "mixtral", "gpt_neox"):
        check_model_folder(model_folder(model_type))
        seen |= json.loads((model_folder(model_type) / "config.json").read_text()).keys()
    assert len(seen & COUNTS.keys()) > 8


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, FACTS])
def test_an_adapters_folder_likewise(name, make_model, tmp_path):
    save_adapter(attach(make_model("llama"), AdapterSpec(rank=2), [1], seed=0), tmp_path / "a", {})
    adapter_folder(tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    os.mkfifo(tmp_path / "a" / name)
    with pytest.raises(UserError, match="is no regular file"):
        adapter_folder(tmp_path / "a")
