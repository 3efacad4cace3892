"""`swlora chat` and `generate --chat` as a person uses them, on a terminal and through a pipe."""

import builtins
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from swlora.cli import main
from swlora.cli.chat import DEFAULTS, chat_settings
from swlora.config import DecodeSpec
from swlora.decoding.batch import BatchDecoder
from swlora.errors import UserError

GREEDY = ("--temperature", 0, "--max-new-tokens", 8)


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def swlora(capsys, tmp_path, monkeypatch) -> Callable[..., Done]:
    """A function that runs a command on the lines of a file, or as typed on a terminal."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, piped: str = "", typed: Sequence[Any] | None = None) -> Done:
        stdin = io.StringIO(piped)
        answers = iter(typed or ())

        def enter(_prompt: str = "") -> str:
            item = next(answers, EOFError)
            if isinstance(item, str):
                return item
            raise item

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", stdin)
            if typed is not None:
                patch.setattr(stdin, "isatty", lambda: True)
                patch.setattr(builtins, "input", enter)
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as end:
                return Done(int(end.code or 0), *capsys.readouterr())
        return Done(0, *capsys.readouterr())

    return run


@pytest.fixture
def model(model_folder) -> list[object]:
    return ["--model", model_folder("llama"), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def answer(swlora, model) -> str:
    """The greedy answer to "Hi"."""
    done = swlora("generate", *model, *GREEDY, "--prompt", "Hi", "--chat")
    assert done.code == 0
    return done.out


def test_a_pipe_gets_answers_and_nothing_else(swlora, model, answer):
    done = swlora("chat", *model, *GREEDY, piped="Hi\n\n/reset\nHi\n/quit\nHi\n")
    assert (done.code, done.out) == (0, answer * 2)
    assert "the conversation begins anew" in done.err
    assert swlora("chat", *model, *GREEDY, piped="Hi").out == answer


def test_the_conversation_as_json(swlora, model, answer, tmp_path):
    path = tmp_path / "talk.json"
    done = swlora("chat", *model, *GREEDY, "--system", "be brief", "--json", path, piped="Hi\n")
    result = json.loads(path.read_text())
    assert result["system"] == "be brief"
    assert result["turns"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": done.out.strip()},
    ]
    whole = swlora("generate", *model, *GREEDY, "--prompt", "Hi", "--system", "be brief")
    assert done.out == whole.out != answer
    said = swlora("chat", *model, *GREEDY, piped="/system be brief\nHi\n/reset\n/system\nHi\n")
    assert said.out == whole.out + answer


def test_a_mistake_ends_a_file_and_not_a_conversation(swlora, model, answer):
    piped = swlora("chat", *model, *GREEDY, piped="/adapter nowhere\nHi\n")
    assert (piped.code, piped.out) == (2, "")
    assert piped.err.splitlines()[-1] == "swlora: there is no adapter folder nowhere"
    lines = ["/adapter nowhere", "/adapter", "/frobnicate", "/help", "Hi", "/quit", "Hi"]
    typed = swlora("chat", *model, *GREEDY, typed=lines)
    assert (typed.code, typed.out) == (0, answer)
    for said in (
        "there is no adapter folder nowhere",
        "/adapter needs a folder",
        "there is no command /frobnicate",
        "/reset         forget all turns",
    ):
        assert said in typed.err


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(swlora, model, answer, monkeypatch):
    step, n_steps = BatchDecoder.step, [0]

    def interrupted(self: BatchDecoder) -> Any:
        n_steps[0] += 1
        if n_steps[0] == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(BatchDecoder, "step", interrupted)
    done = swlora("chat", *model, *GREEDY, typed=["Hi", KeyboardInterrupt, "/reset", "Hi"])
    assert done.code == 0
    first, second = done.out.removesuffix(answer + "\n").strip("\n"), answer
    assert done.out.endswith(second + "\n")
    assert answer.startswith(first) and first != answer.strip("\n")
    assert "(stopped)" in done.err and "/quit or Ctrl-D ends" in done.err


def test_an_interrupted_pipe_ends(swlora, model, monkeypatch):
    def interrupted(_self: BatchDecoder) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(BatchDecoder, "step", interrupted)
    assert swlora("chat", *model, piped="Hi\nHi\n").code == 130


def test_settings_left_open_are_chats_own():
    assert chat_settings(DecodeSpec()) == DecodeSpec(**DEFAULTS)
    given = DecodeSpec(temperature=0.0, max_new_tokens=7)
    assert chat_settings(given) == DecodeSpec(temperature=0.0, max_new_tokens=7, top_p=0.9)
    for setting in ({"num_beams": 2}, {"no_repeat_ngram_size": 3}):
        with pytest.raises(UserError, match=r"leave decode.* out of --config"):
            chat_settings(DecodeSpec(**setting))


def test_help_shows_chats_own_settings(swlora):
    done = swlora("chat", "--help")
    shown = " ".join(done.out.split())
    assert done.code == 0
    for default in DEFAULTS.values():
        assert f"[default: {default}]" in shown
    assert "--num-beams" not in shown and "Example:" in shown


def test_no_template_is_one_line(swlora, model_folder, tmp_path):
    import shutil

    folder = shutil.copytree(model_folder("llama"), tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    for command in (("chat",), ("generate", "--prompt", "Hi", "--chat")):
        done = swlora(*command, "--model", folder)
        assert (done.code, done.out) == (2, "")
        assert "has no chat template" in done.err.splitlines()[-1]
