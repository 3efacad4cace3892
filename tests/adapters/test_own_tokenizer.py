"""An adapter's own tokenizer: taken with the adapter, and compared where a model's own stays."""

import json
from pathlib import Path

import pytest
from tests.deploy.test_merge import adapter_of
from tests.support.data_files import write_rows
from tests.support.hub_cache import into_hub_cache, use_hub_cache
from transformers import AutoTokenizer

from swlora.adapters.on_base import load_with_adapter
from swlora.adapters.own_tokenizer import other_tokens
from swlora.adapters.saved import TOKENIZER_CONFIG, read_facts
from swlora.cli import main
from swlora.config import ModelSpec
from swlora.evaluation.prompting import prompt_ids

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant]"


@pytest.fixture
def other(model_folder, tmp_path) -> Path:
    """A tokenizer of the same tokens, with another chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def adapter(model_folder, other, tmp_path, monkeypatch) -> Path:
    """The adapter of a run on a model of the Hub, which was given another tokenizer."""
    use_hub_cache(monkeypatch, tmp_path / "hub")
    into_hub_cache(model_folder("llama"), tmp_path / "hub", "some/model")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}])
    flags = ["--model", "some/model", "--tokenizer", other, "--dataset", data, "--eval-file", data]
    flags += ["--dtype", "float32", "--max-steps", 1, "--output", tmp_path / "run"]
    main(["train", *map(str, flags)])
    return tmp_path / "run/adapter"


def shown_to(spec: ModelSpec, adapter: Path) -> str:
    tokenizer = load_with_adapter(spec, adapter, lambda _: None).tokenizer
    return str(tokenizer.decode(prompt_ids(["Hi"], tokenizer, is_chat=True, separator="")[0]))


def test_it_is_taken_with_the_adapter_wherever_that_lies(adapter, other, model_folder, tmp_path):
    assert read_facts(adapter)["base_on_hub"]
    moved = into_hub_cache(adapter, tmp_path / "hub", "some/adapter")
    for folder in (adapter, moved):
        for spec in (ModelSpec(), ModelSpec(name="some/model")):
            assert shown_to(spec, folder) == "[user] Hi[assistant]"
    of_model = ModelSpec(tokenizer=str(model_folder("llama")))
    assert shown_to(of_model, adapter) == "<s>user:Hi;<s>assistant:"


def test_commands_write_prompts_as_in_training(adapter, tmp_path, capsys, monkeypatch):
    seen = []
    render = AutoTokenizer.from_pretrained(adapter).__class__.get_chat_template

    def noted(self, *args, **kwargs):
        seen.append(render(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.get_chat_template", noted)
    data = tmp_path / "chats.jsonl"
    chats = ["--dataset", data, "--eval-file", data, "--output", tmp_path / "eval"]
    for command in (["generate", "--prompt", "Hi"], ["eval", *chats]):
        seen.clear()
        flags = [*command, "--adapter", adapter, "--max-new-tokens", 2]
        main(list(map(str, flags)))
        assert set(seen) == {TEMPLATE}


def test_what_differs_from_a_tokenizer_in_use_is_said(adapter, model_folder, tmp_path):
    own, base = (AutoTokenizer.from_pretrained(f) for f in (adapter, model_folder("llama")))
    assert other_tokens(adapter, own, is_chat=True) is None
    assert "another chat template" in str(other_tokens(adapter, base, is_chat=True))
    assert other_tokens(adapter, base, is_chat=False) is None  # its prompts are plain texts
    elsewhere = adapter_of(model_folder("llama"), tmp_path / "a")
    assert other_tokens(elsewhere, base, is_chat=True) is None
    (elsewhere / "chat_template.jinja").unlink()  # as older versions of transformers save it
    config = json.loads((elsewhere / TOKENIZER_CONFIG).read_text()) | {"chat_template": TEMPLATE}
    (elsewhere / TOKENIZER_CONFIG).write_text(json.dumps(config))
    assert "another chat template" in str(other_tokens(elsewhere, base, is_chat=True))
    assert other_tokens(elsewhere, own, is_chat=True) is None

    written = json.loads((elsewhere / "tokenizer.json").read_text())
    vocab = written["model"]["vocab"]
    (elsewhere / "tokenizer.json").write_text(json.dumps(written))  # the same, written otherwise
    assert other_tokens(elsewhere, own, is_chat=True) is None
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (elsewhere / "tokenizer.json").write_text(json.dumps(written))
    assert "another vocabulary" in str(other_tokens(elsewhere, own, is_chat=False))
    for damage in ("[]", "{", '{"model": 1}'):  # whoever loads it says so
        (elsewhere / "tokenizer.json").write_text(damage)
        assert other_tokens(elsewhere, own, is_chat=True) is None
