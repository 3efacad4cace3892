"""Chats in GGUF files: llama.cpp cuts them at special tokens as the tokenizer does, or it is said.

What llama.cpp makes of white space and of SentencePiece's space behind special tokens is not what
every tokenizer does.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.deploy.test_gguf_tokenizer import sentencepiece_tokenizer
from tests.deploy.test_merge import adapter_of
from tests.support.gguf_models import bpe_tokenizer, tiny_model
from tests.support.llama_cpp import require_llama_cpp
from tokenizers import AddedToken
from transformers import AutoTokenizer

from swlora.config import ModelSpec
from swlora.deploy import gguf_export
from swlora.deploy.gguf_export import Exported, ExportRequest
from swlora.deploy.merge_report import MERGE_REPORT
from swlora.errors import RunFailedError
from swlora.models.gguf_header import read_gguf_table
from swlora.progress import Silent

PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")


def save_model(folder: Path, *, takes: bool, legacy: bool, has_all: bool = True) -> None:
    """Save a tiny model with a tokenizer like Phi-3's.

    takes: whether its special tokens take the white space behind them; legacy: whether it puts a
    space behind them; has_all: whether it has all tokens that llama.cpp wants of a Phi-3.
    """
    tokenizer = sentencepiece_tokenizer(True)
    added = [AddedToken(token, rstrip=takes, normalized=False) for token in CHAT_TOKENS]
    added += [AddedToken("<|endoftext|>", normalized=False)] if has_all else []
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.chat_template = PHI3
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))


def export(folder: Path, output: str = "x.gguf") -> Exported:
    request = ExportRequest(ModelSpec(name=str(folder), device="cpu"), folder.parent / output)
    return gguf_export.export(request, Silent())


def facts_of(path: Path) -> dict[str, Any]:
    return dict(read_gguf_table(path).facts)


@pytest.fixture(params=[True, False], ids=["run", "read back"])
def with_and_without_llama_cpp(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check files in llama.cpp, and where it is not found by reading them back."""
    if request.param:
        require_llama_cpp()
    else:
        monkeypatch.setattr(gguf_export, "find_llama_cpp", lambda _: None)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("takes", [True, False])
def test_chats_are_cut_as_the_tokenizer_cuts_them(
    takes: bool, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_llama_cpp()
    save_model(tmp_path / "model", takes=takes, legacy=legacy)
    exported = export(tmp_path / "model")
    assert exported.check.tokens_equal and exported.check.chat_tokens_equal
    facts = facts_of(tmp_path / "x.gguf")
    assert facts["general.name"] == ("model (phi-3)" if takes else "model")
    assert facts["tokenizer.ggml.add_space_prefix"] == legacy
    assert bool(exported.notes) == (not legacy)
    assert legacy or "a text that is no chat begins otherwise" in str(exported.notes)
    monkeypatch.setattr(gguf_export, "find_llama_cpp", lambda _: None)
    check = export(tmp_path / "model", "y.gguf").check
    assert check.tokens_equal and check.chat_tokens_equal and not check.node_llama_cpp


def test_a_model_that_was_trained_on_texts_has_them_cut_right(tmp_path: Path) -> None:
    require_llama_cpp()
    save_model(tmp_path / "model", takes=False, legacy=False)
    (tmp_path / "model" / MERGE_REPORT).write_text('{"adapter": {"is_chat": false}}')
    exported = export(tmp_path / "model")
    assert exported.check.tokens_equal and exported.check.chat_tokens_equal is False
    assert facts_of(tmp_path / "x.gguf")["tokenizer.ggml.add_space_prefix"] is True
    (note,) = exported.notes or []
    assert "cuts chats into other tokens than the tokenizer does, at special tokens" in note
    report = json.loads((tmp_path / "x.gguf.report.json").read_text())
    assert report["notes"] == [note]


@pytest.mark.usefixtures("with_and_without_llama_cpp")
def test_chats_that_begin_with_plain_text_and_go_on_behind_special_tokens_are_noted(
    tmp_path: Path,
) -> None:
    """As TinyLlama's: no file of llama.cpp can have both right, so it is that or none."""
    save_model(tmp_path / "model", takes=False, legacy=False)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}so: "
    (tmp_path / "model/chat_template.jinja").write_text(template)
    exported = export(tmp_path / "model")
    assert exported.check.tokens_equal and exported.check.chat_tokens_equal is False
    assert "at special tokens" in str(exported.notes)


def test_a_lora_says_which_file_of_its_base_it_needs(tmp_path: Path) -> None:
    require_llama_cpp()
    save_model(tmp_path / "model", takes=False, legacy=False)
    spec = ModelSpec(name=str(tmp_path / "model"), device="cpu")
    adapter = adapter_of(tmp_path / "model", tmp_path / "adapter", size=0.3)
    request = ExportRequest(spec, tmp_path / "lora.gguf", adapter)
    exported = gguf_export.export(request, Silent())
    assert exported.check.chat_tokens_equal
    (note,) = exported.notes or []
    assert "must put no space before texts" in note


@pytest.mark.usefixtures("with_and_without_llama_cpp")
def test_chats_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", takes=True, legacy=True, has_all=False)
    refused = r"cuts chats into other tokens .* --tokenizer"
    with pytest.raises(RunFailedError, match=refused) as error:
        export(tmp_path / "model")
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_model_that_is_called_phi3_and_is_none_gets_another_name(
    kind: str, tmp_path: Path
) -> None:
    """llama.cpp would look for Phi-3's tokens in it, and not load it without."""
    require_llama_cpp()
    tokenizer = bpe_tokenizer() if kind == "bytes" else sentencepiece_tokenizer(True)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "Like-PHI-3-tiny")
    tokenizer.save_pretrained(tmp_path / "Like-PHI-3-tiny")
    assert export(tmp_path / "Like-PHI-3-tiny").check.tokens_equal
    assert facts_of(tmp_path / "x.gguf")["general.name"] == "Like-PHI_3-tiny"


def test_a_chat_of_bytes_is_compared_too(tmp_path: Path) -> None:
    require_llama_cpp()
    tiny_model("llama").save_pretrained(tmp_path / "model")
    bpe_tokenizer().save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    exported = export(tmp_path / "model")
    assert exported.check.chat_tokens_equal and exported.notes is None
