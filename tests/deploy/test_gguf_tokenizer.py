"""Tokenizers in GGUF files: what llama.cpp cannot do is refused, SentencePiece's works."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import CHAT_TEMPLATE
from tests.support.gguf_models import bpe_tokenizer, tiny_model
from tests.support.llama_cpp import require_llama_cpp
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swlora.config import ModelSpec
from swlora.deploy import gguf_export
from swlora.deploy.gguf_export import ExportRequest
from swlora.deploy.gguf_tokenizer import SPACE, read_tokens
from swlora.deploy.ollama_files import has_other_template
from swlora.errors import UserError
from swlora.models.gguf_header import read_gguf_table
from swlora.progress import Silent

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXT = "it's the items don't they  the two spaces two café École the then there 12345 items"


def sentencepiece_tokenizer(prefix: bool) -> PreTrainedTokenizerFast:
    """Return BPE over whole texts with a byte for each character that is no token, as Llama 2's."""
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never")
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=70, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    vocab = {token: k for k, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *learned])}
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    settings = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    core = Tokenizer(models.BPE(vocab, merges, **settings))
    core.normalizer = normalizer
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_cuts_the_same_in_llama_cpp(prefix: bool, tmp_path: Path) -> None:
    require_llama_cpp()
    tokenizer = sentencepiece_tokenizer(prefix)
    assert len(tokenizer.tokenize(" the then")) < 5  # it merges
    tiny_model("llama", vocab_size=len(tokenizer) + 3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    spec = ModelSpec(name=str(tmp_path / "model"), device="cpu")
    exported = gguf_export.export(ExportRequest(spec, tmp_path / "x.gguf"), Silent())
    assert exported.check.tokens_equal and exported.check.node_llama_cpp
    tokens = read_tokens(tokenizer, len(tokenizer) + 3)
    assert (tokens.model, tokens.add_space_prefix) == ("llama", prefix)


@pytest.mark.parametrize("family", ["Llama", "PreTrainedTokenizerFast"])
def test_a_space_that_llama_2s_tokenizer_passes_over_is_no_other_text(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers makes nothing of a first space where the class is LlamaTokenizer."""
    folder, tokenizer = tmp_path / "model", sentencepiece_tokenizer(True)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizer" if family == "Llama" else family
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    read = AutoTokenizer.from_pretrained(folder)
    assert (read.tokenize(" x") == read.tokenize("x")) == (family == "Llama")
    spec = ModelSpec(name=str(folder), device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_export, "find_llama_cpp", lambda _: None)
        exported = gguf_export.export(ExportRequest(spec, tmp_path / "x.gguf"), Silent())
    assert exported.check.tokens_equal and not exported.check.node_llama_cpp
    require_llama_cpp()
    exported = gguf_export.export(ExportRequest(spec, tmp_path / "y.gguf"), Silent())
    assert exported.check.tokens_equal and exported.check.node_llama_cpp


@pytest.mark.parametrize("names", [("default", "tool_use"), ("rag", "tool_use")])
def test_several_chat_templates_are_written_by_their_names(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    folder, tokenizer = tmp_path / "model", bpe_tokenizer()
    templates = {name: f"{{# {name} #}}{CHAT_TEMPLATE}" for name in names}
    tokenizer.chat_template = templates
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template == templates
    require_llama_cpp()
    request = ExportRequest(ModelSpec(name=str(folder), device="cpu"), tmp_path / "x.gguf")
    check = gguf_export.export(request, Silent()).check
    n_chats = int("default" in names)  # else the tokenizer itself writes none without tools
    assert check.agreement.n_continuations == 8 + n_chats
    facts = read_gguf_table(tmp_path / "x.gguf").facts
    key = "tokenizer.chat_template"
    found = {name: facts.get(key if name == "default" else f"{key}.{name}") for name in names}
    assert found == templates and (key in facts) == bool(n_chats)
    assert not has_other_template(read_gguf_table(tmp_path / "x.gguf"), tokenizer)


def changed(kind: str, part: str, step: Any) -> PreTrainedTokenizerFast:
    tokenizer = bpe_tokenizer() if kind == "bytes" else sentencepiece_tokenizer(True)
    setattr(tokenizer.backend_tokenizer, part, step)
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "part", "step", "named"),
    [
        ("bytes", "normalizer", normalizers.NFKC(), "NFKC"),
        ("bytes", "normalizer", normalizers.Lowercase(), "Lowercase"),
        ("bytes", "normalizer", normalizers.Replace("a", "b"), "Replace"),
        ("bytes", "normalizer", normalizers.Prepend("x"), "Prepend"),
        (
            "bytes",
            "normalizer",
            normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]),
            r"\(Strip\)",
        ),
        ("spm", "normalizer", normalizers.Sequence([normalizers.NFC()]), "NFC"),
        ("spm", "normalizer", normalizers.Replace(Regex(" +"), SPACE), "Replace"),
        ("spm", "pre_tokenizer", pre_tokenizers.Metaspace(split=True), "Metaspace"),
        ("spm", "pre_tokenizer", pre_tokenizers.Digits(), "Digits"),
    ],
)
def test_a_step_that_llama_cpp_has_not_is_refused(
    kind: str, part: str, step: Any, named: str
) -> None:
    with pytest.raises(UserError, match=f"a step that llama.cpp has not.*{named}"):
        read_tokens(changed(kind, part, step), 400)


def test_composed_letters_and_whole_words_of_sentencepiece_are_let_pass() -> None:
    read_tokens(changed("bytes", "normalizer", normalizers.NFC()), 400)
    whole = pre_tokenizers.Metaspace(split=False, prepend_scheme="never")
    read_tokens(changed("spm", "pre_tokenizer", whole), 400)
