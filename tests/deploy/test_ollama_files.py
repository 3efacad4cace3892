"""The GGUF files for Ollama are those of the model whose template they get, and what is first."""

import json
import re

import gguf
import numpy as np
import pytest
from tests.deploy.test_ollama import BYTES, folder
from tests.support import chat_templates as shapes
from tests.support.gguf_files import change_metadata, write_gguf
from tests.support.gguf_models import save_tiny
from tests.support.llama_cpp import require_llama_cpp

from swlora.config import ModelSpec
from swlora.deploy.gguf_export import ExportRequest, export
from swlora.deploy.go_evaluate import evaluate
from swlora.deploy.llama_cpp import Question, ask
from swlora.models.gguf_header import GgufHeader, read_gguf_table
from swlora.models.gguf_tokenizer import adds_bos
from swlora.progress import Silent

__all__ = ["folder"]


def about(kind: str, cut: str | None = None, noted: bool | None = None) -> GgufHeader:
    facts = {"model": kind, "pre": cut, "add_bos_token": noted}
    named = {f"tokenizer.ggml.{key}": value for key, value in facts.items() if value is not None}
    return GgufHeader("llama", {}, named)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (about("llama"), True),
        (about("llama", "default", noted=False), False),
        (about("gpt2"), False),
        (about("gpt2", "smollm"), False),
        (about("gpt2", "qwen2"), False),
        (about("gpt2", "gpt-2", noted=True), True),
        (about("gpt2", "llama-bpe"), True),
        (about("gpt2", "tekken"), True),
        (about("gpt2", "lfm2"), True),
        (about("gpt2", "llama-bpe", noted=False), False),
        (about("bert"), True),
        (about("t5"), False),
        (about("t5", "tekken"), False),  # a cut is of byte-level tokenizers alone
        (about("gemma4", noted=False), True),
        (about("gpt2", "gemma4", noted=False), True),
    ],
)
def test_bos_comes_first_where_llama_cpp_puts_it(header, expected):
    assert adds_bos(header) is expected


def test_llama_cpp_itself_says_so(tmp_path):
    llama_cpp, path = require_llama_cpp(), tmp_path / "x.gguf"
    save_tiny("llama", tmp_path / "model")
    export(ExportRequest(ModelSpec(name=str(tmp_path / "model")), path, kind="f32"), Silent())
    said = {}
    for cut in ("gpt-2", "llama-bpe", "tekken", "qwen2", None):
        changes = {"tokenizer.ggml.pre": cut, "tokenizer.ggml.add_bos_token": None}
        change_metadata(path, changes)
        said[cut] = ask(llama_cpp, Question(path)).add_bos
        assert adds_bos(read_gguf_table(path)) == said[cut], cut
    assert (said["llama-bpe"], said["qwen2"]) == (True, False)


def template_in(folder) -> str:
    text = (folder / "out/Modelfile").read_text()
    return re.findall(r'^TEMPLATE """(.*?)"""$', text, re.S | re.M)[0]


@pytest.mark.parametrize(("cut", "begins"), [("smollm", True), ("llama-bpe", False)])
def test_a_template_that_writes_bos_writes_it_once(cut, begins, folder, swlora, make_model):
    tokenizer = shapes.chat_tokenizer(shapes.LLAMA_3)
    tokenizer.save_pretrained("model")
    model = make_model("llama", vocab_size=len(tokenizer) + 1)
    model.save_pretrained("model")
    write_gguf(model, tokenizer, folder / "tuned.gguf")
    change_metadata(folder / "tuned.gguf", {"tokenizer.ggml.pre": cut})
    done = swlora("package", *BYTES, "--model", "model")
    assert done.code == 0, done.err
    asked = [{"role": "user", "content": "Hi"}]
    for turns in (asked, [{"role": "system", "content": "Be kind."}, *asked]):
        text = evaluate(template_in(folder), turns)
        assert text.startswith("<s>") is begins and text.count("<s>") == int(begins)


def test_bos_that_the_model_never_saw_is_told(folder, swlora):
    change_metadata(folder / "tuned.gguf", {"tokenizer.ggml.pre": "tekken"})
    done = swlora("package", *BYTES, "--model", "model", "--no-chat")
    assert "has llama.cpp put BOS (<s>) first; the model has none" in done.out
    assert template_in(folder) == "{{ .Prompt }}"


def test_bos_that_only_the_models_tokenizer_writes_stands_in_the_template(
    folder, swlora, bos_tokenizer
):
    bos_tokenizer().save_pretrained("model")
    assert swlora("package", *BYTES, "--model", "model", "--no-chat").code == 0
    assert template_in(folder) == "<s>{{ .Prompt }}"


def test_a_file_of_another_model_is_refused(folder, swlora, make_model, tiny_tokenizer):
    changes = {
        "the architecture is llama in the file and qwen2 in the model": ("qwen2", {}),
        "the number of layers is 3 in the file and 2": ("llama", {"num_hidden_layers": 2}),
        "the number of tokens is 264 in the file and 300": ("llama", {"vocab_size": 300}),
        "the size of an embedding is 24 in the file and 32": ("llama", {"hidden_size": 32}),
    }
    base = make_model("llama").config
    assert (base.num_hidden_layers, base.vocab_size, base.hidden_size) == (3, 264, 24)
    for said, (kind, sizes) in changes.items():
        make_model(kind, **sizes).save_pretrained("other")
        tiny_tokenizer.save_pretrained("other")
        mistake = swlora("package", *BYTES, "--model", "other").mistake
        assert "tuned.gguf was not made of --model other" in mistake and said in mistake
    assert not (folder / "out").exists()


def test_a_file_whose_texts_end_otherwise_is_refused(folder, swlora):
    for name in ("config.json", "generation_config.json"):
        tree = json.loads((folder / "model" / name).read_text()) | {"eos_token_id": 5}
        (folder / "model" / name).write_text(json.dumps(tree))
    config = json.loads((folder / "model/tokenizer_config.json").read_text())
    (folder / "model/tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "!"}))
    mistake = swlora("package", *BYTES, "--model", "model", "--no-chat").mistake
    assert "its texts end with token 257" in mistake


def test_another_template_in_the_file_is_told(folder, swlora, tiny_tokenizer):
    key = "tokenizer.chat_template"
    change_metadata(folder / "tuned.gguf", {key: tiny_tokenizer.chat_template})
    assert "another one" not in swlora("package", *BYTES, "--model", "model").out
    change_metadata(folder / "tuned.gguf", {key: shapes.CHATML})
    done = swlora("package", *BYTES[:-1], "again", "--model", "model")
    assert "the file's own chat template is another one: the model's was taken" in done.out


@pytest.mark.parametrize(
    ("tensor", "shape", "said"),
    [
        ("blk.7.attn_q.weight.lora_a", (2, 24), "changes blk.7.attn_q.weight, which tuned.gguf"),
        ("blk.0.attn_q.weight.lora_a", (2, 25), "has another shape in tuned.gguf"),
        ("blk.0.attn_q.weight.lora_b", (23, 2), "has another shape in tuned.gguf"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tensor, shape, said, folder, swlora):
    writer = gguf.GGUFWriter(folder / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor(tensor, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = swlora("package", *BYTES, "--model", "model", "--gguf-lora", "lora.gguf")
    assert said in done.mistake


def test_stops_are_texts_and_not_entries_of_the_vocabulary(folder, swlora):
    path = folder / "model/generation_config.json"
    tree = json.loads(path.read_text()) | {"eos_token_id": [257, ord("\n"), ord("!"), ord('"')]}
    path.write_text(json.dumps(tree))
    done = swlora("package", *BYTES, "--model", "model", "--no-chat")
    text = (folder / "out/Modelfile").read_text()
    stops = re.findall(r'^PARAMETER stop "(.*?)"$', text, re.S | re.M)
    assert stops == ["\n", "!", "</s>"]
    assert "note: no Modelfile can hold '\"' as a stop" in done.out
