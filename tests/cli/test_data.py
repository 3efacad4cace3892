"""`swlora data` as a person sees it, for prompts and completions, chats, and odd rows."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from tests.support.data_files import write_rows

from swlora.models import load

PAIRS = [{"prompt": f"p{k // 3}: ", "completion": f"{k}.\n"} for k in range(9)]
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "And\nnow"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture
def model(model_folder, tmp_path, monkeypatch) -> Path:
    """A folder without weights: whoever opens them fails."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.glob("*.safetensors"))
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    return folder


@pytest.fixture
def data(swlora, model):
    """A function rows, *flags -> what the command printed."""

    def run(rows, *flags):
        path = write_rows(Path("rows.jsonl"), rows)
        return swlora("data", "--model", model, "--dataset", path, *flags)

    return run


def table(out: str) -> dict[str, list[str]]:
    """The lines of the table by their names."""
    lines = out[out.index(" train") :].splitlines()
    return {(cells := re.split(r"  +", line))[0]: cells[1:] for line in lines}


def test_pairs_with_their_trained_tokens_and_counts(data):
    done = data(PAIRS, "--rows", 2)
    assert done.code == 0
    shown = done.out.partition("\n\n  ")[0]
    assert shown.splitlines() == [
        "trained tokens are between ⟦ and ⟧",
        "",
        "rows.jsonl, line 1: 8 tokens, 4 trained",
        "p0: ⟦0.↵",
        "</s>⟧",
        "",
        "rows.jsonl, line 2: 8 tokens, 4 trained",
        "p0: ⟦1.↵",
        "</s>⟧",
    ]
    found = table(done.out)
    assert found["rows"] == ["6", "3"]  # the last of three prompts is held out
    assert found["prompts"] == ["2; 6 rows share theirs", "1; 3 rows share theirs"]
    assert found["tokens"] == ["48, 50.0% trained", "24, 50.0% trained"]
    assert found["tokens a sequence"][0] == "8 median, 8 p95, 8 longest"
    assert found["over the context of 256"] == ["0", "0"]
    # A step holds one row where there are so few, so that nothing of seven nodes is shared.
    assert found["steps an epoch"] == ["6"]
    assert found["tree nodes a step"] == ["7"]
    assert not Path("runs").exists()


def test_what_a_step_shares_goes_by_its_flags(data):
    """Six rows in one step: two prompts of 4 tokens, three branches of 3 nodes each."""
    found = table(data(PAIRS, "--batch-size", 6).out)
    assert found["sequences a step"] == ["6.0"]
    n_nodes = 1 + 2 * (3 + 3 * 3)  # "p" is shared by all
    assert found["tree nodes a step"] == [str(n_nodes)]
    assert found["tokens : tree nodes"][0].startswith(f"{48 / n_nodes:.2f},")


def test_every_answer_of_a_chat_is_marked(data):
    tiny = [{"messages": CHAT}, {"messages": CHAT[:2]}, {"messages": [*CHAT[:1], CHAT[3]]}]
    out = data(tiny, "--rows", 1).out
    marked = re.findall("⟦(.*?)⟧", out.partition("\n\n  ")[0].partition("\n\n")[2], re.DOTALL)
    assert len(marked) == 2
    assert marked[0].startswith("Yes?") and marked[1].startswith("No.")
    last = data(tiny, "--rows", 1, "--train-on", "last-turn").out
    marked = re.findall("⟦(.*?)⟧", last.partition("\n\n  ")[0].partition("\n\n")[2], re.DOTALL)
    assert len(marked) == 1 and marked[0].startswith("No.")


def test_a_fraction_of_a_weight_is_said(data):
    answers = [CHAT[0], CHAT[1] | {"weight": 0.5}]
    out = data([{"messages": answers}, {"messages": CHAT}, {"messages": CHAT[:2]}]).out
    assert "⟦0.5: Yes?" in out


def test_control_characters_of_the_data_do_not_reach_the_terminal(data):
    nasty = "\x1b[31mred\x07\t\u202ea\r\nb"
    out = data([{"prompt": "x", "completion": nasty}, *PAIRS]).out
    assert r"x⟦\x1b[31mred\x07\t\u202ea\r↵" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_long_texts_are_shown_without_their_middle(data, swlora, model):
    words = "a" * 100 + "b" * 2000 + "c" * 100
    Path(model / "config.json").write_text(
        json.dumps(
            json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4000}
        )
    )
    out = data([{"prompt": words, "completion": "d"}, *PAIRS]).out
    assert f"{'a' * 100}{'b' * 500} … 1,000 characters … {'b' * 500}{'c' * 100}⟦d</s>⟧" in out


def test_documents_are_shown_in_their_pieces(data):
    """A context holds 256 tokens, of which the first one is the piece's start."""
    texts = [{"text": "x" * 255 * 5}, {"text": "short\x1b"}, {"text": "other"}]
    done = data(texts, "--rows", 2)
    assert "line 1, sequence 1 of 6: 256 tokens, 255 trained\n<s>⟦xxx" in done.out
    assert "sequence 4 of 6" in done.out and "sequence 5 of 6" not in done.out
    assert "rows.jsonl, line 2: 8 tokens, 7 trained\n<s>⟦short\\x1b</s>⟧" in done.out
    found = table(done.out)
    assert (found["rows"], found["sequences"]) == (["2", "1"], ["7", "1"])
    assert found["over the context of 256"] == ["0", "0"]


def test_what_a_training_would_refuse_is_counted_and_said(data):
    rows = [*PAIRS, {"prompt": "x" * 300, "completion": "y"}, {"prompt": "", "completion": "y"}]
    rows += [{"prompt": "p8: ", "completion": "8."}] * 2
    done = data(rows)
    assert done.code == 0
    assert table(done.out)["over the context of 256"] == ["1", "0"]
    assert table(done.out)["bad rows"] == ["1: its prompt is empty"]
    said = [line for line in done.out.splitlines() if line.startswith("a training refuses")]
    assert said == [
        "a training refuses bad rows (1): --skip-bad-rows leaves them out",
        "a training refuses rows longer than the context (1): --truncate cuts them",
    ]
    assert "refuses" not in data(rows, "--skip-bad-rows", "--truncate").out


def test_duplicates_and_prompts_of_both_splits_are_counted(data):
    write_rows(Path("eval.jsonl"), [PAIRS[0], {"prompt": "new", "completion": "x"}])
    found = table(data([*PAIRS, PAIRS[4], PAIRS[4]], "--eval-file", "eval.jsonl").out)
    assert found["repeated rows"] == ["2"]
    assert found["rows with a prompt of dev or test"] == ["3"]


def test_the_result_as_json_holds_the_rows_whole(data):
    assert data(PAIRS, "--rows", 1, "--json", "data.json").code == 0
    found = json.loads(Path("data.json").read_text())
    (row,) = found["shown"]
    assert (row["place"], row["n_sequences"]) == ("rows.jsonl, line 1", 1)
    (sequence,) = row["sequences"]
    assert (sequence["n_tokens"], sequence["n_trained_tokens"]) == (8, 4)
    assert sequence["spans"] == [
        {"text": "p0: ", "weight": 0.0, "is_special": False},
        {"text": "0.\n", "weight": 1.0, "is_special": False},
        {"text": "</s>", "weight": 1.0, "is_special": True},
    ]
    assert found["train"]["n_rows"] == 6 and found["held_out"]["split"] == "dev"
    assert found["refused"] == [] and found["bad_rows"] == {}


def test_no_rows_are_shown_where_none_are_asked_for(data):
    out = data(PAIRS, "--rows", 0).out
    assert "⟦" not in out and table(out)["rows"] == ["6", "3"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "-1"], "'--rows'"),
        (["--dtype", "float32"], "No such option: --dtype"),
        (["--dataset", "gone.jsonl"], "cannot read gone.jsonl"),
        (["--model", "./gone"], "there is no model folder"),
        (["--train-on", "last-turn"], "no row is a chat; leave it out"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_mistakes_are_one_line(data, flags, said):
    assert said in data(PAIRS, *flags).mistake


def test_trained_tokens_are_coloured_on_a_terminal(data, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = data(PAIRS, "--rows", 1).out
    assert "p0: \x1b[32m0.↵" in out and "\x1b[2;32m</s>" in out and "⟦" not in out


def test_a_terminal_without_unicode_is_written_codes(data, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    assert data([{"prompt": "é: ", "completion": "x"}, *PAIRS]).code == 0
    assert rb"\xe9: \u27e6x</s>\u27e7" in written.getvalue()
