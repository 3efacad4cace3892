"""Models in Python: loaded, continued, merged and exported as by the commands."""

import json
import os
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from tests.support.api_calls import TRAINING, run_command

import swlora
from swlora.errors import UserError
from swlora.result_json import as_json
from swlora.runs import read_run


def test_a_model_is_loaded_with_its_adapter_and_generates(settings, model_folder) -> None:
    swlora.train(**settings, **TRAINING, output="../run")
    model = {name: settings[name] for name in ("model", "dtype", "device")}
    loaded, base = swlora.load("../run", **model), swlora.load(**model)
    ids = torch.tensor([[5, 6, 7]])
    plain = peft.PeftModel.from_pretrained(base.model, "../run/adapter").eval()
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    given = {**model, "max_new_tokens": 4}
    text = swlora.generate("name[E]", adapter="../run", **given).text
    written = run_command("generate", given, "--adapter", "../run", "--prompt", "name[E]")
    assert text == written["text"]
    assert os.listdir() == []
    kept = swlora.generate("name[E]", adapter="../run", **given, output="../text")
    assert json.loads(Path("../text/result.json").read_text()) == as_json(kept) == written
    assert read_run(Path("../text"))["command"] == "generate"


@pytest.mark.parametrize(
    ("prompt", "model", "mistake"),
    [
        (5, "builtin", "a prompt is a text, or a list of texts"),
        (["a", None], "builtin", "a prompt is a text, or a list of texts"),
        ("a", torch.nn.Linear(2, 2), r"trained\.loaded\), not Linear$"),
    ],
)
def test_what_cannot_be_generated_from_is_named(prompt, model, mistake) -> None:
    with pytest.raises(UserError, match=mistake):
        swlora.generate(prompt, model=model)


def test_merge_returns_the_report_and_takes_the_settings_of_its_command(model_folder, tmp_path):
    from tests.deploy.test_merge import adapter_of

    base = model_folder("llama")
    adapter = adapter_of(base, tmp_path / "a")
    merged = swlora.merge(adapter, tmp_path / "m", model=base, dtype="float16")
    assert merged.dtype == "float16" and (tmp_path / "m" / "config.json").is_file()
    with pytest.raises(UserError, match="takes no dtype 'int8'"):
        swlora.merge(adapter, tmp_path / "n", model=base, dtype="int8")
    for shard_gb in (0.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"shard_gb must be at least 0\.001 and finite"):
            swlora.merge(adapter, tmp_path / "n", model=base, shard_gb=shard_gb)
    with pytest.raises(UserError, match="no setting 'temperature'"):
        swlora.merge(adapter, tmp_path / "n", model=base, temperature=1.0)


def test_prompts_in_a_list_get_their_texts_from_a_model_at_hand(settings) -> None:
    trained = swlora.train(**settings, **TRAINING, output="../run")
    model = {name: settings[name] for name in ("model", "dtype", "device")}
    prompts = ["name[E]", "name[Fritz], food[yy]"]
    each = [swlora.generate(p, adapter="../run", max_new_tokens=4, **model) for p in prompts]
    loaded = swlora.load("../run", **model)
    for at_hand in (loaded, trained.loaded):
        assert swlora.generate(prompts, model=at_hand, max_new_tokens=4) == each
    assert swlora.generate(prompts[0], model=loaded, max_new_tokens=4) == each[0]
    swlora.generate(prompts, model=loaded, max_new_tokens=4, output="../texts")
    assert json.loads(Path("../texts/result.json").read_text()) == {"texts": as_json(each)}
    with pytest.raises(UserError, match="loaded already: leave out adapter, dtype, or give it to"):
        swlora.generate("a", model=loaded, adapter="../run", dtype="float32")
    with pytest.raises(UserError, match="no prompt"):
        swlora.generate([], model=loaded)
    with pytest.raises(UserError, match="--system is a turn of a chat"):
        swlora.generate(["a"], model="nowhere", chat=False, system="be brief")


def test_an_adapter_that_was_loaded_with_its_model_gets_prompts_in_its_form(settings) -> None:
    """With the separator that training put behind a prompt, and as chats where it saw chats."""
    loaded = swlora.load(model=settings["model"], dtype="float32")
    chats = replace(loaded, adapter_facts={"is_chat": True})
    assert swlora.generate("a", model=chats, max_new_tokens=1).chat
    apart = replace(loaded, adapter_facts={"separator": "name"})
    found = swlora.generate("a", model=apart, max_new_tokens=6).text
    assert found == swlora.generate("aname", model=loaded, max_new_tokens=6).text
    assert found != swlora.generate("a", model=loaded, max_new_tokens=6).text


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        ({}, "give either --gguf FILE for a model or --gguf-lora"),
        ({"gguf": "m.gguf", "adapter": "a"}, "merge the adapter into it first"),
        ({"gguf_lora": "m.gguf"}, "--gguf-lora needs the adapter"),
        ({"gguf": "m.gguf", "type": "int8"}, "f32, f16, bf16 or q8_0, not 'int8'"),
        ({"gguf": "m.gguf", "rank": 3}, "export takes no setting 'rank'"),
        ({"gguf": "m.bin", "model": "builtin"}, "end it with .gguf"),
    ],
)
def test_mistakes_in_an_export_are_named(arguments, mistake) -> None:
    with pytest.raises(UserError, match=mistake):
        swlora.export(**arguments)
