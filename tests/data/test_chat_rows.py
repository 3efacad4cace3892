"""Chats of files: what is used of them, and what is refused by name because it is not."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.chat_templates import chat as chat_of

from swlora.config import DataSpec
from swlora.data.examples import Example
from swlora.data.rows import read_rows
from swlora.data.sources import load_dataset
from swlora.errors import DataError

OTHERS = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]
TURNS = (("system", ""), ("user", "Hi"), ("assistant", "Yes?"), ("user", "é"))
MESSAGES = [{"role": r, "content": c} for r, c in (*TURNS, ("assistant", "E"))]
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def write(folder: Path, row: dict[str, Any]) -> str:
    """Write a file whose second row is `row`."""
    path = folder / "rows.jsonl"
    rows = [OTHERS[0], row, OTHERS[1]]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def chat(number: int | None = None, **fields: Any) -> dict[str, Any]:
    """The chat, message `number` of which has these fields too; or the row, for none."""
    messages = [m | (fields if i == number else {}) for i, m in enumerate(MESSAGES)]
    return {"messages": messages} | ({} if number is not None else fields)


def read(folder: Path, row: dict[str, Any]) -> Example:
    """Return the example that a row becomes."""
    _, example = load_dataset(DataSpec(name=write(folder, row))).train
    return example


@pytest.mark.parametrize(
    "row",
    [
        chat(),
        chat(id=7, source="made up", tools=[], functions=None, system=""),  # no, or no meaning
        chat(1, name=None, tool_calls=[], refusal="", weight=None, train=None),
        chat(4, refusal=None, function_call={}),
    ],
)
def test_fields_that_say_nothing_change_nothing(tmp_path: Path, row):
    example = read(tmp_path, row)
    assert example == chat_of(TURNS, "E")
    assert (example.completion, example.place) == ("E", f"{tmp_path / 'rows.jsonl'}, line 2")


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"weight": 0}, 0.0),
        ({"weight": 1}, 1.0),
        ({"weight": 0.25, "train": True}, 0.25),
        ({"weight": 3}, 3.0),
        ({"train": True}, 1.0),
        ({"train": False}, 0.0),
        ({"train": False, "weight": 0.0}, 0.0),
    ],
)
def test_an_answer_says_how_much_it_is_trained(tmp_path: Path, fields, trained):
    messages = read(tmp_path, chat(2, **fields)).messages
    assert [turn.trained for turn in messages] == [None, None, trained, None, None]


def test_other_fields_are_kept_for_the_template(tmp_path: Path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": "é"}}}
    messages = [
        {"role": "developer", "content": "", "name": "Ann"},
        {"role": "user", "content": PARTS},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "x"},
        {"role": "assistant", "content": "E", "reasoning_content": "Hm."},
    ]
    example = read(tmp_path, {"messages": messages, "tools": [{"b": 1, "a": 2}]})
    said = [json.loads(turn.extra) for turn in example.messages]
    assert said == [
        {"name": "Ann"},
        {"content": PARTS},
        {"tool_calls": [call], "content": None},
        {"tool_call_id": "x"},
        {"reasoning_content": "Hm."},
    ]
    assert [turn.content for turn in example.messages] == ["", "Hi", "", "1", "E"]
    assert example.tools == '[{"b": 1, "a": 2}]'  # in their order: templates write them as they are
    assert '"arguments": {"b": 1, "a": "é"}' in example.messages[2].extra


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**OTHERS[0], "tools": [1]}, "it has the field 'tools': only chats have them"),
        (chat(tools=["f"]), "its tools are not a list of objects"),
        (chat(tools=[{"name": "\ud800"}]), "its tools are not valid text"),
        (chat(functions=[{"name": "f"}]), "'functions': give them as tools"),
        (chat(documents=[{"text": "d"}]), "'documents': it is not used; leave it out"),
        (chat(chat_template_kwargs={"enable_thinking": False}), "'chat_template_kwargs'"),
        (chat(images=["x.png"]), "'images': only text is used"),
        (chat(system="Be brief."), "'system': write it as the first message, with the role 'sys"),
        (chat(1, weight=1), "a message of the user is to be trained, and only the assistant's are"),
        (chat(0, train=True), "a message of the system is to be trained"),
        (chat(4, weight="1"), "the weight of a message is '1', not a number"),
        (chat(4, weight=True), "the weight of a message is True, not a number"),
        (chat(4, weight=-1), "the weight of a message is -1, not a number from 0 on"),
        (chat(4, weight=float("nan")), "the weight of a message is nan, not a number from 0 on"),
        (chat(4, train=1), "the field 'train' of a message is 1, not true or false"),
        (chat(4, train=False, weight=1), "a message has the weight 1 and train false"),
        (chat(1, content=[*PARTS, IMAGE]), "of the user is not a string, or parts that are text"),
        (chat(1, content=[PARTS[0] | {"lang": "fr"}]), "not a string, or parts that are text"),
        (chat(1, content=["Hi"]), "not a string, or parts that are text"),
        (chat(1, content=None), "a message of the user has no content"),
        (chat(1, content="a\0"), "a message of the user holds a NUL byte"),
        (chat(1, content="\ud800"), "a message of the user is not valid UTF-8"),
        (chat(1, name="\ud800"), "a message of the user is not valid text"),
        (chat(4, content=[]), "an answer of the assistant is empty; leave it out, or give it the"),
        (chat(2, content=" "), "an answer of the assistant is empty"),
        (chat(4, content=None), "a message of the assistant has no content"),
        (chat(1, role="banker"), "has the role 'banker', not one of system, developer, user"),
        (chat(1, role="tool"), "a message of the tool stands before the first answer of the assis"),
        (chat(4, role="user"), "its last message is not the assistant's: leave out what follows"),
        ({"messages": MESSAGES[:1]}, "its messages are not a list of two turns or more"),
        ({"messages": "Hi"}, "its messages are not a list of two turns or more"),
        ({"messages": [m | {"content": ""} for m in MESSAGES[:2]] + MESSAGES[4:]}, "prompt is emp"),
        (
            {"messages": [m | {"weight": 0} for m in MESSAGES]},
            "the weight of all its answers is 0, so nothing is trained",
        ),
    ],
)
def test_what_is_not_used_is_refused_by_name_and_line(tmp_path: Path, row, reason):
    name = write(tmp_path, row)
    with pytest.raises(DataError) as caught:
        load_dataset(DataSpec(name=name))
    assert str(caught.value).startswith(f"{name}, line 2: ")
    assert reason in str(caught.value)
    dataset = load_dataset(DataSpec(name=name, skip_bad_rows=True))
    assert (len(dataset.train), dataset.counts.n_bad) == (1, 1)


def test_a_column_that_is_asked_for_is_used_whatever_its_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"documents": "A text.\\n", "image": "An answer."}\n')
    rows = read_rows([path], {"prompt": "documents", "completion": "image"}, False)
    assert rows.examples == (Example("A text.\n", "An answer."),) and not rows.bad
