"""A record of any form becomes the example that the same words in another form become."""

import re
from datetime import date
from typing import Any

import pytest

from swlora.data.examples import Example, Message
from swlora.data.forms import Recogniser

CHAT = Example.chat(
    [Message("system", "Be kind."), Message("user", "Why?"), Message("assistant", "So.")]
)
ASKED = Example.chat([Message("user", "Why?"), Message("assistant", "So.")])
TURNS = [{"role": m.role, "content": m.content} for m in CHAT.messages]
SAID = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]


@pytest.mark.parametrize(
    ("record", "example"),
    [
        ({"prompt": "Why?", "completion": "So."}, Example("Why?", "So.")),
        ({"messages": TURNS}, CHAT),
        ({"messages": TURNS, "prompt": "Why?", "prompt_id": 3}, CHAT),
        ({"prompt": TURNS[1:2], "completion": TURNS[2:]}, ASKED),
        ({"conversations": SAID}, ASKED),
        ({"conversations": TURNS}, CHAT),
        ({"conversations": SAID, "id": 1, "messages": None}, ASKED),
        ({"conversations": SAID, "system": "Be kind."}, CHAT),
        ({"conversations": SAID, "system": ""}, ASKED),
        ({"instruction": "Why?", "output": "So."}, ASKED),
        ({"instruction": "Why?", "input": "", "output": "So.", "text": "### Why?"}, ASKED),
        ({"instruction": "Why?", "input": None, "output": "So."}, ASKED),
        ({"instruction": "Why?", "output": "So.", "system": "Be kind."}, CHAT),
        ({"text": "A text.", "label": 1}, Example(text="A text.")),
    ],
)
def test_forms(record: dict[str, Any], example: Example) -> None:
    found = Recogniser({}).example(record)
    assert found == example


def test_an_input_stands_below_its_instruction() -> None:
    found = Recogniser({}).example({"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert isinstance(found, Example)
    assert found.messages[0].content == "Add.\n\n1, 2"


def test_turns_before_the_completion_are_read_only() -> None:
    prompt = [*TURNS[1:], {"role": "user", "content": "And?"}]
    completion = [{"role": "assistant", "content": "No."}]
    found = Recogniser({}).example({"prompt": prompt, "completion": completion})
    assert isinstance(found, Example)
    assert [turn.trained for turn in found.messages] == [None, 0.0, None, None]


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"conversations": SAID},
        {"instruction": "Why?", "output": "So."},
        {"prompt": TURNS[:2], "completion": TURNS[2:]},
    ],
)
def test_tools_come_as_a_list_or_as_json(tools: Any, record: dict[str, Any]) -> None:
    found = Recogniser({}).example({**record, "tools": tools})
    assert isinstance(found, Example) and found.tools == '[{"name": "f"}]'


@pytest.mark.parametrize(
    ("columns", "record", "example"),
    [
        (
            {"prompt": "question", "completion": "answer"},
            {"question": "Why?", "answer": "So.", "prompt": "x", "completion": "y"},
            Example("Why?", "So."),
        ),
        ({"completion": "text"}, {"prompt": "Why?", "text": "So."}, Example("Why?", "So.")),
        ({"messages": "dialog"}, {"dialog": TURNS}, CHAT),
        ({"text": "body"}, {"body": "A text.", "prompt": "x"}, Example(text="A text.")),
        ({"text": "text"}, {"text": "A text.", "prompt": "x"}, Example(text="A text.")),
        ({"instruction": "q", "output": "a"}, {"q": "Why?", "a": "So."}, ASKED),
        ({"system": "sys"}, {"conversations": SAID, "sys": "Be kind."}, CHAT),
    ],
)
def test_columns_that_were_named(columns, record, example) -> None:
    assert Recogniser(columns).example(record) == example


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a"}, "no known form: 'prompt'; the nearest forms have prompt and completion;"),
        ({"prompt": "a", "text": "b"}, "such as completion=text"),
        ({"question": "a", "response": "b"}, "such as prompt=question,completion=response"),
        ({"dialogue": []}, "nearest forms have messages; .*such as messages=dialogue"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "such as completion=chosen"),
        ({"prompt": None, "completion": "a"}, "its prompt is not a string"),
        ({"prompt": "a", "completion": 3}, r"its completion is not a string \(a number\)"),
        ({"prompt": "a", "completion": date(2024, 5, 1)}, r"is not a string \(date\)"),
        ({"prompt": ["a"], "completion": ["b"]}, r"its prompt is not a string \(a list\)"),
        ({f"c{i}": 1 for i in range(99)}, "'c10', 'c11' and 87 more; the nearest"),
        ({"x" * 5000: 1}, "no known form: 'x{39};"),
        ({"instruction": "a", "input": 3, "output": "b"}, "its instruction or input is not a str"),
        ({"instruction": "a", "output": ""}, "its output is empty"),
        ({"conversations": "a"}, "its conversations are not a list of turns"),
        ({"conversations": [{"from": "x"}]}, "has no from and value"),
        ({"conversations": [{"from": "bing!", "value": "a"}]}, "a turn is from 'bing!', not"),
        ({"text": "  "}, "its text is empty"),
        ({"text": 1}, "its text is not a string"),
        ({"text": "a\0"}, "its text holds a NUL byte"),
        ({"messages": TURNS, "tools": "f"}, "its tools are not a list of objects"),
        ({"prompt": "a", "completion": "b", "images": ["c"]}, "only text is used"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "'system': write it into the prompt"),
        ({"prompt": "a", "completion": "b", "input": "c"}, "'input': write it into the pr"),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, "'tools': only chats have them"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "write its turns"),
    ],
)
def test_what_is_no_example_says_why(record: dict[str, Any], reason: str) -> None:
    found = Recogniser({}).example(record)
    assert isinstance(found, str)
    assert re.search(reason, found), found


PAIR, PAIR_NAMES = {"q": "Why?", "a": "So."}, {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("columns", "record", "reason"),
    [
        ({**PAIR_NAMES, "input": "context"}, {**PAIR, "context": "x"}, "write it into the prompt"),
        ({**PAIR_NAMES, "system": "sys"}, {**PAIR, "sys": "x"}, "write it into the prompt"),
        ({"system": "sys"}, {"messages": TURNS, "sys": "x"}, "write it as the first message,"),
        ({"input": "context"}, {"messages": TURNS, "context": "x"}, "its form has no 'input'; le"),
        ({**PAIR_NAMES, "text": "body"}, {**PAIR, "body": "x"}, "its form has no 'text'; leave it"),
    ],
)
def test_a_named_column_that_the_form_of_a_row_has_no_use_for(
    columns: dict[str, str], record: dict[str, Any], reason: str
) -> None:
    """Nobody names a column in order to have it left out in silence."""
    *_, name = columns.values()
    found = Recogniser(columns).example(record)
    assert isinstance(found, str) and found.startswith(f"it has the field {name!r}: {reason}")
    for nothing in ("", None):
        assert isinstance(Recogniser(columns).example({**record, name: nothing}), Example)


def test_a_named_column_that_is_not_there() -> None:
    found = Recogniser({"prompt": "q", "completion": "a"}).example({"q": "x", "b": "y"})
    assert found == "it has no column 'a'; columns found: 'q', 'b'"


def test_a_named_column_is_looked_for_in_all_records() -> None:
    recogniser = Recogniser({"input": "context"})
    record = {"instruction": "Why?", "output": "So."}
    assert recogniser.example(record) == ASKED and recogniser.unseen == "context"
    recogniser.example({**record, "context": "Here."})
    recogniser.example(record)
    assert not recogniser.unseen
