"""A folder for Ollama: the Modelfile names what lies beside it, and says what the model needs."""

import json
import re

import gguf
import numpy as np
import pytest
from tests.support import chat_templates as shapes
from tests.support.gguf_files import write_gguf
from tests.support.gguf_models import LONG, export_tiny
from tests.support.llama_cpp import require_llama_cpp

from swlora.deploy.llama_cpp import Question, ask

BYTES = ("--ollama", "--gguf", "tuned.gguf", "--output", "out")


@pytest.fixture
def folder(make_model, tiny_tokenizer, tmp_path, monkeypatch):
    """A model's folder with a GGUF file and an adapter beside it."""
    monkeypatch.chdir(tmp_path)
    model = make_model("llama")
    model.save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    write_gguf(model, tiny_tokenizer, tmp_path / "tuned.gguf")
    write_lora(tmp_path / "lora.gguf", "llama")
    return tmp_path


def write_lora(path, architecture: str) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 24), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_folder_has_all_that_ollama_is_told(folder, swlora):
    done = swlora(
        *("package", *BYTES, "--gguf-lora", "lora.gguf", "--model", "model"),
        *("--system", 'Say "yes".', "--temperature", 0.2, "--num-ctx", 100, "--json", "p.json"),
    )
    assert done.code == 0, done.err
    text = (folder / "out/Modelfile").read_text()
    template, system = re.findall(r'^(?:TEMPLATE|SYSTEM) """(.*?)"""$', text, re.S | re.M)
    assert template.endswith("{{ end }}{{ end }}<s>assistant:") and "<s>user:" in template
    assert system == 'Say "yes".'
    lines = text.splitlines()
    assert lines[1:3] == ["FROM ./tuned.gguf", "ADAPTER ./lora.gguf"]
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop "</s>"',
        "PARAMETER num_ctx 100",
        "PARAMETER repeat_penalty 1.0",
        "PARAMETER temperature 0.2",
    ]
    for name in ("tuned.gguf", "lora.gguf"):
        assert (folder / "out" / name).samefile(folder / name)
        assert f"out/{name} (a hard link)" in done.out
    assert "  ollama create out -f out/Modelfile\n  ollama run out\n" in done.out
    assert json.loads((folder / "p.json").read_text())["template"] == template


def test_a_copy_is_made_where_no_link_can_be(folder, swlora, monkeypatch):
    def other_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", other_disk)
    assert "out/tuned.gguf (a copy)" in swlora("package", *BYTES, "--model", "model").out
    assert (folder / "out/tuned.gguf").read_bytes() == (folder / "tuned.gguf").read_bytes()


def test_prompts_are_passed_on_as_they_are_for_a_model_of_texts(folder, swlora):
    done = swlora("package", *BYTES, "--model", "model", "--no-chat")
    assert 'TEMPLATE """{{ .Prompt }}"""' in (folder / "out/Modelfile").read_text()
    assert "num_ctx 256" in (folder / "out/Modelfile").read_text()
    assert "passed on as they are" in done.out


def test_a_model_of_long_factors_has_its_original_context(tmp_path, swlora):
    """LongRoPE: beyond that, llama.cpp takes the long factors for short texts, too."""
    rope = {"rope_theta": 10000.0, **LONG, "partial_rotary_factor": 1.0}
    own = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256}
    _, token_ids = export_tiny("phi3", tmp_path, rope_parameters=rope, **own)
    where = ("--ollama", "--gguf", "x.gguf", "--model", "model", "--no-chat")
    for flags, n_tokens, said in (
        ((), 256, "the context is 256 tokens"),
        (("--num-ctx", 200), 200, ""),
        (("--num-ctx", 400), 400, "beyond a context of 256 tokens llama.cpp computes short texts"),
    ):
        output = f"out{n_tokens}"
        done = swlora("package", *where, *flags, "--output", output)
        assert f"num_ctx {n_tokens}\n" in (tmp_path / output / "Modelfile").read_text()
        assert said in done.out and ("factors for long ones" in done.out) == bool(said)

    def computed(*others):
        """The text's own log probabilities, in a context that is long enough for the others."""
        asked = Question(tmp_path / "x.gguf", sequences=[token_ids[:20], *others])
        return ask(require_llama_cpp(), asked).log_probabilities[0]

    short, fits, long = computed(), computed([5] * 200), computed([5] * 300)
    assert (short - fits).abs().max() < 1e-4 < (short - long).abs().max()


def test_a_merged_adapter_says_whether_its_prompts_were_chats(folder, swlora):
    report = {"adapter": {"is_chat": False}}
    (folder / "model/swlora-merge.json").write_text(json.dumps(report))
    assert "passed on as they are" in swlora("package", *BYTES, "--model", "model").out
    system = ("--system", "Be kind.")
    mistake = swlora("package", *BYTES[:-1], "no", "--model", "model", *system).mistake
    assert "was trained on prompts with completions" in mistake and not (folder / "no").exists()
    again = swlora("package", *BYTES[:-1], "again", "--model", "model", "--chat", *system)
    assert "passed on as they are" not in again.out
    assert "range .Messages" in (folder / "again/Modelfile").read_text()


def test_a_model_without_a_template_has_no_place_for_a_system_turn(folder, swlora):
    (folder / "model/chat_template.jinja").unlink()
    mistake = swlora("package", *BYTES, "--model", "model", "--system", "Be kind.").mistake
    assert "has no chat template: leave it out" in mistake


def test_a_template_of_ones_own_goes_in_as_it_is(folder, swlora):
    (folder / "own.gotmpl").write_text("[{{ .Prompt }}]\n")
    done = swlora("package", *BYTES, "--model", "model", "--template", "own.gotmpl")
    assert 'TEMPLATE """[{{ .Prompt }}]\n"""' in (folder / "out/Modelfile").read_text()
    assert "it was not compared" in done.out


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (shapes.SYSTEM_IN_THE_LAST_TURN, "in a way that is not translated"),
        ("{{ strftime_now('%d %B %Y') }}" + shapes.CHATML, "writes the date of the day"),
    ],
)
def test_what_cannot_be_translated_leaves_no_folder(template, said, folder, swlora):
    shapes.chat_tokenizer(template).save_pretrained("model")
    mistake = swlora("package", *BYTES, "--model", "model").mistake
    assert said in mistake and "--template FILE" in mistake
    assert not (folder / "out").exists()


def test_mistakes_are_one_line_and_leave_no_folder(folder, swlora):
    write_lora(folder / "other.gguf", "gpt2")
    (folder / "cut.gguf").write_bytes((folder / "tuned.gguf").read_bytes()[:5000])
    (folder / "taken").mkdir()
    (folder / "taken" / "mine").touch()
    changes = {
        "is an adapter: give it as --gguf-lora": ("--gguf", "lora.gguf"),
        "is no adapter; `swlora export --gguf-lora`": ("--gguf-lora", "tuned.gguf"),
        "is for the architecture gpt2": ("--gguf-lora", "other.gguf"),
        "there is no file none.gguf": ("--gguf", "none.gguf"),
        "cannot be read as a GGUF language model": ("--gguf", "cut.gguf"),
        "taken is in use": ("--output", "taken"),
        "has a context of 256 tokens": ("--num-ctx", 257),
        "leave --template out": ("--no-chat", "--template", "own.gotmpl"),
        "cannot read --template own.gotmpl": ("--template", "own.gotmpl"),
        "a chat: leave out --no-chat": ("--no-chat", "--system", "Be kind."),
        "writes no .System": ("--system", "Be kind.", "--template", "plain.gotmpl"),
    }
    (folder / "plain.gotmpl").write_text("[{{ .Prompt }}]")
    for said, change in changes.items():
        assert said in swlora("package", *BYTES, "--model", "model", *change).mistake
    without = swlora("package", *BYTES[1:], "--model", "model").mistake
    assert "give --ollama" in without
    assert not (folder / "out").exists() and len(list((folder / "taken").iterdir())) == 1


def test_a_full_disk_leaves_no_folder(folder, swlora, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    done = swlora("package", *BYTES, "--model", "model")
    assert done.code == 1 and "cannot write out: No space left on device" in done.err
    assert not [path for path in folder.iterdir() if "out" in path.name]
