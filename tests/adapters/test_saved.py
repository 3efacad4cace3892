"""Saved adapters: plain PEFT reads them, and what does not fit a model is refused."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.adapters import attach, randomise

from swlora.adapters.saved import adapter_folder, load_adapter, read_facts, save_adapter
from swlora.config import AdapterSpec
from swlora.errors import RunFailedError, UserError

TOKENS = torch.tensor([[72, 105, 33, 10, 200], [1, 2, 3, 4, 5]])


def trained(model, layers: list[int], **changes):
    """An adapter whose every weight is random, as after training."""
    peft_model = attach(model, AdapterSpec(**{"rank": 3} | changes), layers, seed=1)
    randomise(peft_model, 0.1)
    return peft_model.eval()


@pytest.fixture
def saved(make_model, tmp_path) -> Path:
    save_adapter(trained(make_model("llama"), [0, 2]), tmp_path / "adapter", {})
    return tmp_path / "adapter"


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "phi3", "gpt_neox", "opt", "gemma2"])
@pytest.mark.parametrize("layers", [[0, 2], [0, 1, 2]])
def test_plain_peft_gives_the_same_logits(model_type, layers, make_model, tmp_path):
    ours = trained(make_model(model_type), layers)
    logits = ours(input_ids=TOKENS).logits
    base = make_model(model_type)(input_ids=TOKENS).logits
    assert (logits - base).abs().max() > 0.01
    folder = tmp_path / "adapter"
    save_adapter(ours, folder, {"separator": "\n"})
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "swlora.json",
        "README.md",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    theirs = peft.PeftModel.from_pretrained(make_model(model_type), str(folder)).eval()
    torch.testing.assert_close(theirs(input_ids=TOKENS).logits, logits, rtol=0, atol=1e-4)
    loaded = load_adapter(make_model(model_type), folder)
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, logits, rtol=0, atol=1e-6)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert read_facts(folder) == {"separator": "\n"}


def test_the_saved_keys_name_the_chosen_layers_only(saved):
    keys = load_file(saved / "adapter_model.safetensors")
    assert {key.split(".layers.")[1].split(".")[0] for key in keys} == {"0", "2"}
    assert len(keys) == 2 * 7 * 2
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 2]
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 3)


def test_saving_again_replaces(saved, make_model):
    (saved / "stale").write_text("")
    save_adapter(trained(make_model("llama"), [1]), saved, {"layers": [1]})
    assert read_facts(saved) == {"layers": [1]}
    assert not (saved / "stale").exists()


def test_a_full_disk_leaves_the_old_adapter(saved, make_model, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = trained(make_model("llama"), [1])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(other), "save_pretrained", full)
    with pytest.raises(RunFailedError, match=r"cannot write .*adapter: .*No space left") as failed:
        save_adapter(other, saved, {})
    assert len(str(failed.value).splitlines()) == 1
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_loading_says_nothing(saved, make_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(make_model("llama"), saved)


# What does not fit


def refusal(model, folder: Path) -> str:
    with pytest.raises(UserError) as refused, warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, folder)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt2", {}),
        ("llama", {"hidden_size": 32}),
        ("llama", {"num_hidden_layers": 2}),
        ("llama", {"intermediate_size": 44}),
    ],
)
def test_another_model_is_refused(model_type, changes, saved, make_model):
    assert "does not fit this model" in refusal(make_model(model_type, **changes), saved)


def test_a_deeper_adapter_of_all_layers_is_refused(make_model, tmp_path):
    """PEFT would drop the tensors of the third layer without a word."""
    save_adapter(trained(make_model("llama"), [0, 1, 2]), tmp_path / "adapter", {})
    shallow = make_model("llama", num_hidden_layers=2)
    assert "14 of its tensors have no place and 0 are" in refusal(shallow, tmp_path / "adapter")
    deep = make_model("llama", num_hidden_layers=4)
    assert "0 of its tensors have no place and 14 are" in refusal(deep, tmp_path / "adapter")


@pytest.mark.parametrize("damage", ["weights", "config", "renamed"])
def test_damaged_folders(damage, saved, make_model):
    weights = saved / "adapter_model.safetensors"
    (saved / "swlora.json").unlink()  # as one from elsewhere
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "config":
        (saved / "adapter_config.json").write_text("{")
    else:
        tensors = load_file(weights)
        save_file({f"x{k}": v for k, v in tensors.items()}, weights, {"format": "pt"})
    expected = "cannot be read: it is no JSON" if damage == "config" else "does not fit this model"
    assert expected in refusal(make_model("llama"), saved)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "swlora.json"]
)
@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("bit", [0, 3])
def test_a_flipped_bit_is_noticed(name, place, bit, saved, make_model):
    load_adapter(make_model("llama"), saved)
    content = bytearray((saved / name).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (saved / name).write_bytes(content)
    said = refusal(make_model("llama"), saved)
    assert any(reason in said for reason in ("not as it was saved", "cannot be read", "is damaged"))


def test_who_changes_an_adapter_says_so(saved, make_model):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 5}))
    assert "remove 'sha256' from swlora.json" in refusal(make_model("llama"), saved)
    facts = json.loads((saved / "swlora.json").read_text())
    (saved / "swlora.json").write_text(json.dumps({k: facts[k] for k in facts if k != "sha256"}))
    assert load_adapter(make_model("llama"), saved).peft_config["default"].lora_alpha == 5


def test_notes_that_were_changed_are_noticed_and_another_order_of_them_is_not(saved, make_model):
    path = saved / "swlora.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(facts.items()))))
    load_adapter(make_model("llama"), saved)
    path.write_text(json.dumps(facts | {"separator": "?"}))
    assert "swlora.json is not as it was saved" in refusal(make_model("llama"), saved)


def test_pickled_adapters_are_refused(saved, make_model, tmp_path):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    assert "holds no adapter_model.safetensors; other formats" in refusal(
        make_model("llama"), saved
    )


def test_folders_that_are_no_adapter(tmp_path, saved, make_model):
    assert "holds no adapter_config.json" in refusal(make_model("llama"), tmp_path)
    with pytest.raises(UserError, match="there is no adapter folder"):
        adapter_folder(tmp_path / "gone")
    assert adapter_folder(saved) == adapter_folder(saved.parent) == saved


def test_facts_of_adapters_from_elsewhere(saved):
    (saved / "swlora.json").unlink()
    assert read_facts(saved) == {}
    (saved / "swlora.json").write_text("[1")
    with pytest.raises(UserError, match="is damaged"):
        read_facts(saved)


def test_a_full_disk_leaves_no_half_of_an_adapter(saved, make_model, tmp_path, monkeypatch):
    def full(_scratch: Path, _folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swlora.adapters.saved.replace_folder", full)
    folder = tmp_path / "full" / "adapter"
    with pytest.raises(RunFailedError, match="No space left on device"):
        save_adapter(trained(make_model("llama"), [1]), folder, {})
    assert list(folder.parent.iterdir()) == []


def test_an_adalora_of_pefts_own_with_a_whole_module_loads(make_model, tmp_path):
    config = peft.AdaLoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], init_r=3, target_r=2, total_step=9
    )
    theirs = peft.get_peft_model(make_model("llama"), config)
    theirs.save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3, 4]])
    ours = load_adapter(make_model("llama"), tmp_path)
    assert torch.equal(ours(input_ids=tokens).logits, theirs.eval()(input_ids=tokens).logits)


def test_an_adapter_that_holds_what_is_no_number_is_not_saved(make_model, tmp_path):
    model = attach(make_model("llama"), AdapterSpec(rank=2), [1], seed=0)
    model.get_parameter("base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight").data[
        1, 1
    ] = float("nan")
    with pytest.raises(RunFailedError, match=r"not finite, 1 in .*down_proj.lora_B.weight"):
        save_adapter(model, tmp_path / "adapter", {})
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_tool_that_holds_what_is_no_number(saved, make_model):
    (saved / "swlora.json").unlink()  # and with it the hashes
    weights = load_file(saved / "adapter_model.safetensors")
    name = sorted(weights)[0]
    weights[name][0, :2] = torch.tensor([torch.nan, torch.inf])
    save_file(weights, saved / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"it holds numbers that are not finite, 2 in base_model"):
        load_adapter(make_model("llama"), saved)
