"""A prompt as the model was trained to see it: what is written, where it ends, what is said."""

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.support.adapters import move
from transformers import AutoModelForCausalLM

from swlora.adapters.methods import adapt
from swlora.adapters.saved import save_adapter
from swlora.config import AdapterSpec, RunSpec, load_spec
from swlora.errors import UserError
from swlora.evaluation import decode
from swlora.evaluation.prompting import Prompt, chat_ids, generate_text
from swlora.progress import Silent

EOS, N_NEW = 257, 12
USER = "<s>user:hello;<s>assistant:"
SYSTEM = "<s>system:be brief;"


class Heard(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def adapter(make_model, tmp_path):
    """A function facts -> the folder of an adapter that noted these."""

    def save(**facts: Any) -> Path:
        adapted = adapt(make_model("llama"), AdapterSpec(), [0, 2], seed=1)
        move(adapted.parameters.values(), 0.1)
        save_adapter(adapted.model, tmp_path / "adapter", facts)
        return tmp_path / "adapter"

    return save


def spec_of(folder: Path) -> RunSpec:
    settings = {"model.name": str(folder), "model.dtype": "float32", "model.device": "cpu"}
    return load_spec(None, settings | {"decode.max_new_tokens": N_NEW})


def plain_ids(folder: Path, tokenizer: Any, text: str, adapter: Path | None) -> list[int]:
    """What transformers and PEFT write behind a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ends = {"eos_token_id": EOS, "pad_token_id": EOS}
    out = model.generate(**ids, do_sample=False, max_new_tokens=N_NEW, **ends)
    return list(out[0, ids.input_ids.shape[1] :].tolist())


def plain_text(folder: Path, tokenizer: Any, text: str, adapter: Path | None) -> str:
    return str(
        tokenizer.decode(plain_ids(folder, tokenizer, text, adapter), skip_special_tokens=True)
    )


BY_ITSELF = {"chat": None, "system": None}


@pytest.mark.parametrize(
    ("facts", "asked", "written", "said"),
    [
        (None, {}, "hello", "plain text; --chat writes it"),
        (None, {"chat": False}, "hello", ""),
        (None, {"chat": True}, USER, ""),
        (None, {"system": "be brief"}, SYSTEM + USER, ""),
        ({}, {}, "hello", ""),  # of an adapter from elsewhere nothing is known
        ({"is_chat": False, "separator": "\n"}, {}, "hello\n", ""),
        ({"is_chat": False, "separator": "\n"}, {"chat": True}, USER, "not on chats"),
        ({"is_chat": True}, {}, USER, "trained on chats: the prompt is a user's turn"),
        ({"is_chat": True}, {"system": "be brief"}, SYSTEM + USER, ""),
        ({"is_chat": True}, {"chat": False}, "hello", "trained on chats, but the prompt is plain"),
    ],
)
def test_the_form_of_a_prompt(facts, asked, written, said, adapter, model_folder, tiny_tokenizer):
    folder, heard = model_folder("llama"), Heard()
    place = None if facts is None else adapter(**facts)
    prompt = Prompt("hello", **(BY_ITSELF | asked))
    result = generate_text(spec_of(folder), prompt, place, heard)
    assert result.text == plain_text(folder, tiny_tokenizer, written, place)
    assert result.chat == (written not in ("hello", "hello\n"))
    _, *lines = heard.lines  # the first one names the model
    assert len(lines) == (1 if said else 0)
    assert said in "".join(lines)


def test_a_chat_ends_where_a_turn_does(model_folder, tiny_tokenizer, monkeypatch):
    folder = model_folder("llama")
    ids = plain_ids(folder, tiny_tokenizer, USER, None)
    turn_end = ids[5]
    monkeypatch.setattr(decode, "end_of_turn_tokens", lambda _: frozenset({turn_end}))
    result = generate_text(spec_of(folder), Prompt("hello", chat=True), None, Silent())
    assert result.text == tiny_tokenizer.decode(ids[: ids.index(turn_end)])
    same = generate_text(spec_of(folder), Prompt(USER, chat=False), None, Silent())
    assert same.text == tiny_tokenizer.decode(ids)  # elsewhere it is a token like others


def test_a_system_turn_that_the_template_drops_is_refused(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    assert chat_ids([("user", "hello")], None, tokenizer) == list(b"hello")
    with pytest.raises(UserError, match="no place for a system turn"):
        chat_ids([("user", "hello")], "be brief", tokenizer)


def test_what_cannot_be_a_chat(adapter, model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    for asked in ({"chat": True}, {"system": "x"}):
        prompt = Prompt("hello", **(BY_ITSELF | asked))
        with pytest.raises(UserError, match="no chat template: leave out --chat and --system"):
            generate_text(spec_of(folder), prompt, None, Silent())
    with pytest.raises(UserError, match="no chat template: use --no-chat"):
        generate_text(spec_of(folder), Prompt("hello"), adapter(is_chat=True), Silent())
    with pytest.raises(UserError, match="leave out --no-chat"):
        prompt = Prompt("hello", chat=False, system="x")
        generate_text(spec_of(model_folder("llama")), prompt, None, Silent())
