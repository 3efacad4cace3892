"""Merging: what plain transformers reads is base and adapter; anything else leaves nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.support.adapters import CASES, adapter_spec, move
from tests.support.gguf_files import SIZES, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from swlora.adapters.merged_weights import MergedWeights
from swlora.adapters.methods import adapt
from swlora.adapters.on_base import base_spec
from swlora.adapters.saved import WEIGHTS, load_adapter, save_adapter
from swlora.config import ModelSpec, RunSpec
from swlora.config.yaml_file import dump_yaml
from swlora.deploy.merge import Merged, MergeRequest, merge
from swlora.deploy.merge_report import MERGE_REPORT
from swlora.errors import RunFailedError, UserError
from swlora.models.anatomy import Anatomy
from swlora.models.identity import identify_base
from swlora.models.load import load_model
from swlora.progress import Silent

TOKENS = torch.tensor([[72, 105, 33, 10, 200, 1, 2, 3]])


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(name=str(folder), device="cpu", dtype="float32")


def adapter_of(base: Path, folder: Path, method: str = "lora", size: float = 0.05) -> Path:
    """A folder as training saves it, with the facts about its base."""
    loaded = load_model(spec_of(base))
    named = identify_base(loaded)
    layers = [0, Anatomy(loaded.model).n_layers - 1]
    adapted = adapt(loaded.model, adapter_spec(method), layers, seed=1, n_steps=20)
    move(adapted.parameters.values(), 0.2 if method == "adalora" else size)
    adapted.finish()
    facts = {
        "method": method,
        "base_model": named.name,
        "base_on_hub": named.on_hub,
        "base_flag": named.flag,
        "base_read_from": named.read_from,
        "base_weights_sample_sha256": named.weights_sample_sha256,
    }
    save_adapter(adapted.model, folder, facts, loaded.tokenizer)
    return folder


def of_plain_peft(base: Path, folder: Path, **settings: Any) -> Path:
    """A folder with PEFT's two files alone, all trained weights moved."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, **settings)
    peft_model = get_peft_model(load_model(spec_of(base)).model, config)
    move((p for p in peft_model.parameters() if p.requires_grad), 0.1)
    peft_model.save_pretrained(str(folder))
    return folder


def merged_from(base: Path, adapter: Path, output: Path, **settings: Any) -> Merged:
    return merge(MergeRequest(adapter, output, spec_of(base), **settings), Silent())


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits.float()


def assert_is_base_and_adapter(base: Path, adapter: Path, output: Path) -> None:
    expected = logits_of(load_adapter(load_model(spec_of(base)).model, adapter))
    untouched = logits_of(load_model(spec_of(base)).model)
    found = logits_of(AutoModelForCausalLM.from_pretrained(output, dtype="auto").eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert (untouched - expected).abs().max() > 1e-2


def refusal(base: Path, adapter: Path, output: Path, **settings: Any) -> str:
    there = output.exists()
    with pytest.raises(UserError) as refused:
        merged_from(base, adapter, output, **settings)
    assert len(str(refused.value).splitlines()) == 1
    assert output.exists() == there
    assert not list(output.parent.glob(f".{output.name}*"))
    return str(refused.value)


@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_every_method_is_read_back_by_plain_transformers(
    model_folder, method, model_type, tmp_path
):
    base = model_folder(model_type)
    adapter = adapter_of(base, tmp_path / "a", method)
    merged = merged_from(base, adapter, tmp_path / "m")
    assert_is_base_and_adapter(base, adapter, tmp_path / "m")
    assert merged.agreement.n_equal_continuations == merged.agreement.n_continuations == 9
    assert merged.agreement.n_equal_top_tokens == merged.agreement.n_tokens


FAMILIES = ["phi3", "gpt_neox", "opt", "falcon", "gemma3_text", "olmo2", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_shape_of_family_is_read_back_by_plain_transformers(
    model_folder, model_type, tmp_path
):
    base = model_folder(model_type)
    adapter = adapter_of(base, tmp_path / "a")
    merged_from(base, adapter, tmp_path / "m")
    assert_is_base_and_adapter(base, adapter, tmp_path / "m")
    names = [set(load_file(f / "model.safetensors")) for f in (base, tmp_path / "m")]
    assert names[0] == names[1]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_gguf_base_is_merged_as_it_is_loaded(make_model, tiny_tokenizer, tmp_path, model_type):
    base = tmp_path / "model.gguf"
    write_gguf(make_model(model_type, **SIZES[model_type]), tiny_tokenizer, base, kind="Q8_0")
    adapter = adapter_of(base, tmp_path / "a")
    merged = merged_from(base, adapter, tmp_path / "m")
    assert merged.dtype == "float32"
    assert_is_base_and_adapter(base, adapter, tmp_path / "m")


def test_a_folder_holds_all_that_a_model_needs(model_folder, tmp_path):
    base = model_folder("llama")
    adapter = adapter_of(base, tmp_path / "a")
    merged_from(base, adapter, tmp_path / "m", dtype="bfloat16", shard_gb=20e-6)
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 3
    tensors = {name: t for shard in shards for name, t in load_file(shard).items()}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 257
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.chat_template and tokenizer("ab").input_ids == [97, 98]
    report = json.loads((tmp_path / "m" / MERGE_REPORT).read_text())
    assert report["agreement"]["n_tokens"] > 500 and report["dtype"] == "bfloat16"
    assert 0 < report["kl_nats_per_token"] <= report["tolerance_kl_nats_per_token"]
    assert str(tmp_path) not in (tmp_path / "m" / MERGE_REPORT).read_text()
    assert "base_model" not in (tmp_path / "m" / "README.md").read_text()  # not on the Hub


def test_weights_are_rounded_once(model_folder, tmp_path):
    base = model_folder("llama")
    adapter = adapter_of(base, tmp_path / "a")
    merged_from(base, adapter, tmp_path / "m", dtype="bfloat16")
    model = load_model(spec_of(base)).model
    change, found = MergedWeights(adapter, model), load_file(tmp_path / "m" / "model.safetensors")
    for name in change.changed:
        exact = change.merged(name, model.get_parameter(name))
        assert torch.equal(found[name], exact.to(torch.bfloat16))
    assert len(change.changed) == 14


def test_a_tied_head_whose_embedding_alone_changes_is_untied(make_model, tiny_tokenizer, tmp_path):
    base = tmp_path / "base"
    make_model("llama", tie_word_embeddings=True).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    adapter = of_plain_peft(base, tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    merged = merged_from(base, adapter, tmp_path / "m")
    assert merged.untied_head
    assert_is_base_and_adapter(base, adapter, tmp_path / "m")
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": [72]}
    adapter = of_plain_peft(base, tmp_path / "t", **tokens)
    merged = merged_from(base, adapter, tmp_path / "n")
    assert not merged.untied_head
    assert_is_base_and_adapter(base, adapter, tmp_path / "n")


# What is refused


def test_an_output_in_use_is_refused(model_folder, tmp_path):
    adapter = adapter_of(model_folder("llama"), tmp_path / "a")
    assert "is in use" in refusal(model_folder("llama"), adapter, adapter)
    (tmp_path / "file").write_text("")
    assert "in use" in refusal(model_folder("llama"), adapter, tmp_path / "file")


def test_another_base_is_refused_unless_forced(model_folder, make_model, tiny_tokenizer, tmp_path):
    base, other = model_folder("llama"), tmp_path / "other"
    adapter = adapter_of(base, tmp_path / "a")
    make_model("llama", seed=5).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    assert "holds other weights" in refusal(other, adapter, tmp_path / "m")
    merged = merged_from(other, adapter, tmp_path / "m", force=True)
    assert any("holds other weights" in note for note in merged.notes)
    assert_is_base_and_adapter(other, adapter, tmp_path / "m")
    assert "no module" in refusal(model_folder("gpt2"), adapter, tmp_path / "n", force=True)


def test_a_base_that_changed_since_training_is_refused(model_folder, tmp_path):
    base = Path(shutil.copytree(model_folder("llama"), tmp_path / "base"))
    adapter = adapter_of(base, tmp_path / "a")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert "holds other weights" in refusal(base, adapter, tmp_path / "m")


def test_a_full_disk_leaves_nothing(model_folder, tmp_path, monkeypatch):
    adapter = adapter_of(model_folder("llama"), tmp_path / "a")

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert "No space left" in refusal(model_folder("llama"), adapter, tmp_path / "m")


def test_a_disk_without_room_is_known_before(model_folder, tmp_path, monkeypatch):
    adapter = adapter_of(model_folder("llama"), tmp_path / "a")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "its disk has 1.0 KB free" in refusal(model_folder("llama"), adapter, tmp_path / "m")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_is_wrong_fails_says_where_and_leaves_nothing(
    model_folder, tmp_path, monkeypatch, dtype
):
    adapter = adapter_of(model_folder("llama"), tmp_path / "a", size=0.2)
    right = MergedWeights.merged

    def wrong(self: MergedWeights, name: str, weight: torch.Tensor) -> torch.Tensor:
        merged = right(self, name, weight)
        return weight.float() if name == "model.layers.2.mlp.up_proj.weight" else merged

    monkeypatch.setattr(MergedWeights, "merged", wrong)
    with pytest.raises(RunFailedError, match=r"model\.layers\.2\.mlp\.up_proj") as failed:
        merged_from(model_folder("llama"), adapter, tmp_path / "m", dtype=dtype)
    assert failed.value.exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_an_adapter_that_rounding_would_take_away_is_not_merged_so(model_folder, tmp_path):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(base)
    light = adapter_of(base, tmp_path / "a", size=0.0003)
    with pytest.raises(RunFailedError, match=r"as far from base and adapter as the base is"):
        merged_from(base, light, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    merged = merged_from(base, light, tmp_path / "m", dtype="float32")
    assert merged.kl_nats_per_token < merged.adapter_kl_nats_per_token / 100


def test_an_adapter_that_was_left_out_is_noticed_however_light(model_folder, tmp_path, monkeypatch):
    adapter = adapter_of(model_folder("llama"), tmp_path / "a", size=0.05)
    monkeypatch.setattr(MergedWeights, "merged", lambda _self, _name, weight: weight.float())
    for dtype in ("float32", "bfloat16", "float16"):
        with pytest.raises(RunFailedError, match="was not kept"):
            merged_from(model_folder("llama"), adapter, tmp_path / "m", dtype=dtype)


def test_the_base_is_found_by_what_the_adapter_says(model_folder, tmp_path):
    base = model_folder("llama")
    adapter = adapter_of(base, tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match="--model"):
        merge(MergeRequest(adapter, tmp_path / "m", ModelSpec()), Silent())
    of_run = dump_yaml(RunSpec(model=spec_of(base)))
    (tmp_path / "run" / "config.yaml").write_text(of_run)
    merge(MergeRequest(tmp_path / "run", tmp_path / "m", ModelSpec()), Silent())
    assert_is_base_and_adapter(base, adapter, tmp_path / "m")


def test_a_tokenizer_or_a_revision_that_is_given_beside_no_model_counts(model_folder, tmp_path):
    adapter = adapter_of(model_folder("llama"), tmp_path / "run" / "adapter")
    own = ModelSpec(name=str(model_folder("llama")), tokenizer="its-own")
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(RunSpec(model=own)))
    assert base_spec(adapter, ModelSpec()).tokenizer == "its-own"
    found = base_spec(adapter, ModelSpec(tokenizer="another", revision="v1"))
    assert (found.name, found.tokenizer, found.revision) == (own.name, "another", "v1")


def test_the_base_of_plain_peft_is_the_one_that_it_names(model_folder, tmp_path):
    base = model_folder("llama")
    adapter = of_plain_peft(base, tmp_path / "a", target_modules=["q_proj"])
    merge(MergeRequest(adapter, tmp_path / "m", ModelSpec()), Silent())
    assert_is_base_and_adapter(base, adapter, tmp_path / "m")


def test_an_adapter_cut_off_is_refused(model_folder, tmp_path):
    adapter = of_plain_peft(model_folder("llama"), tmp_path / "a", target_modules=["q_proj"])
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])
    assert "cannot be read" in refusal(model_folder("llama"), adapter, tmp_path / "m")
