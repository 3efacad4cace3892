"""Loading: what is saved comes back, what must never be read or run is not, mistakes are named."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.hub_cache import COMMIT, into_hub_cache, use_hub_cache
from tests.support.mapped import mapped_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from swlora.config import DEFAULT_MODEL, ModelSpec
from swlora.errors import UnknownFamilyError, UserError
from swlora.hub import cached_file
from swlora.models import load
from swlora.models.load import load_model, load_skeleton, settled_model
from swlora.models.precision import cast_parameters

TOKENS = torch.tensor([[72, 105, 33, 10, 200]])


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "hub_reachable", lambda: False)


@pytest.fixture
def copy_of(model_folder, tmp_path):
    """A function model_type -> a copy of its folder that may be changed."""

    def copied(model_type: str) -> Path:
        return Path(shutil.copytree(model_folder(model_type), tmp_path / "copy"))

    return copied


def spec(folder: Path | str, **changes) -> ModelSpec:
    return ModelSpec(name=str(folder), **{"dtype": "float32", "device": "cpu"} | changes)


def refusal(wanted: ModelSpec) -> str:
    with pytest.raises(UserError) as refused:
        load_model(wanted)
    assert refused.value.exit_code == 2
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "executed")


# What is there


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "phi3", "opt"])
def test_a_saved_model_comes_back_frozen_and_the_same(model_type, model_folder, make_model):
    folder = model_folder(model_type)
    loaded = load_model(spec(folder))
    expected = make_model(model_type)(input_ids=TOKENS).logits
    assert torch.equal(loaded.model(input_ids=TOKENS).logits, expected)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.tokenizer("é\n").input_ids == [0xC3, 0xA9, 10]
    assert (loaded.name, loaded.revision) == (str(folder), None)
    assert loaded.source == f"the folder {folder}"
    assert loaded.context_tokens == 256


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text"])
def test_casting_afterwards_is_the_same_as_loading_so(model_type, model_folder):
    """model.to(bfloat16) is not: it rounds the rotary frequencies, too."""
    loaded = load_model(spec(model_folder(model_type), dtype="bfloat16")).model
    cast = load_model(spec(model_folder(model_type), dtype="bfloat16"), dtype="float32").model
    assert {p.dtype for p in cast.parameters()} == {torch.float32}
    cast_parameters(cast, torch.bfloat16)
    for ours, theirs in zip(cast.parameters(), loaded.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    for name, buffer in cast.named_buffers():
        assert buffer.dtype == torch.float32, name
    assert torch.equal(cast(input_ids=TOKENS).logits, loaded(input_ids=TOKENS).logits)


def test_a_models_own_decoding_habits_are_dropped(copy_of):
    folder = copy_of("llama")
    habits = GenerationConfig(do_sample=True, temperature=0.3, repetition_penalty=7.0)
    habits.save_pretrained(folder)
    kept = load_model(spec(folder)).model.generation_config.to_diff_dict()
    assert set(kept) <= {"transformers_version"}


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [257, 12]}, {}, (12, 257)),
        ({"eos_token_id": 12}, {"eos_token_id": [13, 13]}, (12, 13, 257)),
        (None, {"eos_token_id": [257, 40, 7]}, (7, 40, 257)),
        ({"eos_token_id": [264, 50256, 263]}, {"eos_token_id": None}, (257, 263)),
    ],
)
def test_all_tokens_that_end_a_text(generation, config, expected, copy_of):
    """From generation_config.json, config.json and the tokenizer; each must have an embedding."""
    folder = copy_of("llama")
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_model(spec(folder)).end_token_ids == expected
    assert load_skeleton(spec(folder)).end_token_ids == expected


def test_only_a_model_that_was_not_named_gives_way_to_the_embedded_one(monkeypatch, model_folder):
    monkeypatch.setattr(load, "cached_file", lambda *_: None)
    monkeypatch.setattr(load, "_builtin", lambda: str(model_folder("llama")))
    left_out = ModelSpec(dtype="float32", device="cpu")
    assert left_out.name == DEFAULT_MODEL
    loaded = load_model(left_out)
    assert loaded.name == str(model_folder("llama"))
    assert loaded.model.config.model_type == "llama"
    assert "embedded model, because openai-community/gpt2 is not cached" in loaded.source
    assert "embedded" in load_model(spec("builtin")).source
    for asked in (
        spec("some/model"),
        spec(DEFAULT_MODEL),
        ModelSpec(revision="main"),
        ModelSpec(tokenizer=DEFAULT_MODEL),
        ModelSpec(tokenizer=str(model_folder("llama"))),
    ):
        assert "is not cached, and the Hugging Face Hub cannot be reached" in refusal(asked)


def test_what_is_loaded_has_a_name_that_loads_it_again(monkeypatch):
    monkeypatch.setattr(load, "cached_file", lambda *_: None)
    left_out, named = ModelSpec(dtype="float32"), ModelSpec(name=DEFAULT_MODEL)
    assert settled_model(left_out) == ModelSpec(name="builtin", dtype="float32")
    assert settled_model(named) == named
    monkeypatch.setattr(load, "hub_reachable", lambda: True)
    assert settled_model(left_out) == left_out


def test_gpt2s_real_tokenizer_from_a_bare_folder(shared_dir, make_model, tmp_path):
    """That folder names no special tokens: the end of sequence comes from the model's config."""
    make_model("gpt2", vocab_size=50257, eos_token_id=50256).save_pretrained(tmp_path)
    loaded = load_model(spec(tmp_path, tokenizer=str(shared_dir / "gpt2-tokenizer")))
    assert loaded.tokenizer("Hello world").input_ids == [15496, 995]
    assert loaded.tokenizer.eos_token == "<|endoftext|>"
    assert loaded.tokenizer.pad_token is None  # a tokenizer is saved with an adapter as it was
    assert loaded.tokenizer.eos_token_id == 50256


# What must not be read or run


def test_pickled_weights_are_refused_and_never_opened(copy_of, tmp_path):
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    for name in ("pytorch_model.bin", "model.pt", "tokenizer.pkl", "optimizer.bin"):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    assert refusal(spec(folder)).endswith("other formats are not read")
    assert not canary.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())  # the canary does sing
    assert canary.exists()


def test_even_honest_pickled_weights_are_refused(copy_of):
    folder = copy_of("llama")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "model.safetensors" in refusal(spec(folder))


def test_pickles_beside_safetensors_are_never_opened(copy_of, tmp_path):
    folder = copy_of("gpt2")
    canary = tmp_path / "canary"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    load_model(spec(folder))
    assert not canary.exists()


def test_code_in_the_folder_is_never_run(copy_of, tmp_path):
    folder, canary = copy_of("llama"), tmp_path / "canary"
    (folder / "modeling_mine.py").write_text(f"open({str(canary)!r}, 'w').write('executed')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_mine.MyConfig",
        "AutoModelForCausalLM": "modeling_mine.MyModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load_model(spec(folder)).model).__name__ == "LlamaForCausalLM"
    assert not canary.exists()


# Mistakes


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "there is no model folder"),
        ("/nowhere/at/all", "there is no model folder"),
        ("~/nowhere", "there is no model folder"),
        ("a/b/c", "there is no model folder a/b/c"),
        ("some/model", "some/model is not a folder, is not cached"),
        ("model", "model is not a folder, is not cached"),
        ("no such model", "neither a folder nor a Hub id"),
        ("nowhere.gguf", "there is no file nowhere.gguf"),
    ],
)
def test_a_model_that_is_not_there(name, said):
    assert said in refusal(spec(name))


def test_a_name_that_is_no_hub_id_is_refused():
    with pytest.raises(UserError, match="'a b' is neither a folder nor a Hub id"):
        cached_file("a b", "config.json")


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUX" + bytes(100))
    assert "cannot be read as a GGUF" in refusal(spec(tmp_path / "model.gguf"))


def test_an_empty_folder(tmp_path):
    assert "cannot be loaded" in refusal(spec(tmp_path))


def test_an_unknown_family_is_refused_before_its_weights_are_read(tmp_path):
    config = AutoConfig.for_model("bloom", vocab_size=32, hidden_size=8, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnknownFamilyError, match="'bloom' are not supported"):
        load_model(spec(tmp_path))


def test_weights_that_are_missing_are_not_made_up(copy_of):
    folder = copy_of("llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weight, such as model.layers.1.mlp.down_proj.weight" in refusal(spec(folder))


@pytest.mark.parametrize("damage", ["shape", "truncated", "config"])
def test_damaged_folders(damage, copy_of):
    folder = copy_of("llama")
    if damage == "shape":
        weights = load_file(folder / "model.safetensors")
        name = "model.layers.1.mlp.down_proj.weight"
        weights[name] = weights[name][:5].clone()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif damage == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    else:
        (folder / "config.json").write_text("{")
    expected = {
        "shape": "its config.json makes model.layers.1.mlp.down_proj.weight 24 x 40, and the ",
        "truncated": f"{folder / 'model.safetensors'} cannot be read as safetensors: ",
        "config": "config.json cannot be read: it is no JSON",
    }
    assert expected[damage] in refusal(spec(folder))


def test_a_tokenizer_that_is_too_large(shared_dir, model_folder):
    wanted = spec(model_folder("llama"), tokenizer=str(shared_dir / "gpt2-tokenizer"))
    assert "knows 50,257 tokens but the model embeds 264" in refusal(wanted)


def test_a_tokenizer_that_is_not_there(copy_of, tmp_path):
    """transformers makes up an empty one where the files are missing."""
    folder = copy_of("gpt2")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer with a vocabulary; give one with --tokenizer" in refusal(spec(folder))
    wanted = spec(folder, tokenizer="some/tokenizer")
    assert "the tokenizer some/tokenizer is not a folder, is not cached" in refusal(wanted)


def test_a_tokenizer_from_elsewhere_serves_a_folder_without_one(copy_of, model_folder):
    folder = copy_of("gpt2")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    loaded = load_model(spec(folder, tokenizer=str(model_folder("llama"))))
    assert loaded.tokenizer("hi").input_ids == list(b"hi")


def test_no_end_of_sequence_anywhere(copy_of):
    folder = copy_of("gpt2")
    for name, keys in (("tokenizer_config.json", ["eos_token"]), ("config.json", ["eos_token_id"])):
        settings = json.loads((folder / name).read_text())
        settings |= dict.fromkeys(keys)
        (folder / name).write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert "end-of-sequence" in refusal(spec(folder))


def test_a_generation_configuration_that_is_none(copy_of):
    folder = copy_of("llama")
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config\.json of .* cannot be read"):
        load_skeleton(spec(folder))


def test_a_revision_of_something_local(model_folder):
    wanted = spec(model_folder("llama"), revision="main")
    assert "--revision is a version on the Hub" in refusal(wanted)


def test_a_device_that_is_not_there(model_folder):
    wanted = spec(model_folder("llama"), device="cuda:77")
    assert "--device cuda:77: this machine has" in refusal(wanted)


# Other places


def test_a_model_in_the_hubs_cache_needs_no_hub(model_folder, make_model, tmp_path, monkeypatch):
    into_hub_cache(model_folder("llama"), tmp_path, "some/model")
    use_hub_cache(monkeypatch, tmp_path)
    loaded = load_model(spec("some/model"))
    assert (loaded.name, loaded.revision) == ("some/model", COMMIT)
    assert loaded.source == "some/model from the Hugging Face Hub"
    expected = make_model("llama")(input_ids=TOKENS).logits
    assert torch.equal(loaded.model(input_ids=TOKENS).logits, expected)
    assert loaded.tokenizer("hi").input_ids == list(b"hi")
    own = load_model(spec(model_folder("gpt2"), tokenizer="some/model"))
    assert own.tokenizer("hi").input_ids == list(b"hi")


def test_a_model_in_the_wanted_dtype_is_used_where_it_lies(copy_of):
    folder = copy_of("llama")
    for dtype, is_mapped in (("float32", True), ("bfloat16", False)):
        model = load_model(spec(folder, dtype=dtype)).model
        files = {mapped_file(p.data_ptr()) for p in model.parameters()}
        assert files == {folder / "model.safetensors" if is_mapped else None}
