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
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return str(path)


def chat(number: int | None = None, **fields: Any) -> dict[str, Any]:
    """The chat, message `number` of which has these fields too; or the row, for none."""
    messages = [m | (fields if i == number else {}) for i, m in enumerate(MESSAGES)]
    return {"messages": messages} | ({} if number is not None else fields)


@pytest.mark.parametrize(
    "row",
    [
        chat(),
        chat(id=7, source="made up", tools=[], functions=None, system=""),  # no, or no meaning
        chat(1, content=PARTS),
        chat(1, name=None, tool_calls=[], refusal="", weight=None),
        chat(1, weight=0),
        chat(2, weight=0),  # as happens anyway
        chat(4, weight=1),
        chat(4, weight=1.0, refusal=None, function_call={}),
    ],
)
def test_chats_end_at_the_last_answer(tmp_path: Path, row):
    dataset = load_dataset(DataSpec(name=write(tmp_path, row)))
    assert dataset.train == (Example("p", "c"), chat_of(TURNS, "E"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat(tools=[{"type": "function"}]), "it has the field 'tools': write them into the sys"),
        ({**OTHERS[0], "tools": [1]}, "it has the field 'tools'"),
        (chat(functions=[{"name": "f"}]), "'functions'"),
        (chat(documents=[{"text": "d"}]), "'documents': it is not used; leave it out"),
        (chat(chat_template_kwargs={"enable_thinking": False}), "'chat_template_kwargs'"),
        (chat(images=["x.png"]), "'images': only text is used"),
        (chat(system="Be brief."), "'system': write it as the first message, with the role 'sys"),
        (chat(4, weight=0), "the weight of its last answer is 0, and nothing else is trained"),
        (chat(2, weight=1), "the assistant before the last answer has weight 1, and only the last"),
        (chat(1, weight=1), "of the user before the last answer has weight 1"),
        (chat(4, weight=0.5), "the weight of a message is 0.5, not 0 or 1"),
        (chat(4, weight="1"), "the weight of a message is '1', not 0 or 1"),
        (chat(4, tool_calls=[{"id": "x"}]), "of the assistant has the field 'tool_calls': write"),
        (chat(4, tool_calls=[{"id": "x"}], content=None), "has the field 'tool_calls'"),
        (chat(4, function_call={"name": "f"}), "has the field 'function_call'"),
        (chat(4, reasoning_content="Hm."), "the field 'reasoning_content': write it into the con"),
        (chat(1, name="Ann"), "a message of the user has the field 'name': it is not used"),
        (chat(1, mood="glad"), "has the field 'mood': it is not used; leave it out"),
        (chat(1, content=[*PARTS, IMAGE]), "of the user is not a string, or parts that are text"),
        (chat(1, content=[PARTS[0] | {"lang": "fr"}]), "not a string, or parts that are text"),
        (chat(1, content=["Hi"]), "not a string, or parts that are text"),
        (chat(1, content=None), "a message of the user has no content"),
        (chat(4, content=[]), "its completion is empty"),
        (chat(1, role="developer"), "has the role 'developer', not one of system, user, assist"),
    ],
)
def test_what_is_not_used_is_refused_by_name_and_line(tmp_path: Path, row, reason):
    name = write(tmp_path, row)
    with pytest.raises(DataError) as caught:
        load_dataset(DataSpec(name=name))
    assert str(caught.value).startswith(f"{name}, line 2: ")
    assert reason in str(caught.value)
    dataset = load_dataset(DataSpec(name=name, skip_bad_rows=True))
    assert (len(dataset.train), dataset.n_skipped_rows) == (1, 1)


def test_a_column_that_is_asked_for_is_used_whatever_its_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"documents": "A text.\\n", "image": "An answer."}\n')
    examples, n_bad = read_rows(path, ("documents", "image"), False)
    assert (examples[0].prompt, examples[0].completion, n_bad) == ("A text.\n", "An answer.", 0)
