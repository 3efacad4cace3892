"""Every trained answer against rendering turn by turn with transformers, for what templates do."""

import json
import re
from typing import Any

import pytest
from tests.support.chat_families import FAMILIES, taught, turn_by_turn
from tests.support.chat_templates import SPECIAL, chat_tokenizer

from swlora.data.chat_encode import encode_chats
from swlora.data.chat_rows import make_chat
from swlora.data.examples import Example

THOUGHT = "<think>\nLong ago.\n</think>\n\nYes?"
CALL = {"type": "function", "function": {"name": "find", "arguments": {"city": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
SYSTEM = {"role": "system", "content": "Be brief."}


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


PLAIN = turns("Hi", " Yes? ", "é", "So.\nWell", "And?", "No")
THINKING = turns("Hi", THOUGHT, "é", THOUGHT.replace("Yes", "So"), "And?", "No")
CALLING = [
    *turns("Where?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "Here."},
    {"role": "tool", "content": "There."},
    *turns("x", "Here and there.", "Thanks", "Fine.")[1:],
]
# How many sequences the chats become: one, unless a template rewrites what it wrote before
CASES = [
    *((name, PLAIN, None, 1) for name in FAMILIES if name not in ("Qwen 3",)),
    ("Qwen 3", PLAIN, None, 3),  # an empty block of reasoning, which earlier answers lose
    *(
        (name, [SYSTEM, *PLAIN], None, 1)
        for name in FAMILIES
        if name not in ("Qwen 3", "Gemma 2", "Mistral")
    ),
    ("Qwen 3", [SYSTEM, *THINKING], None, 3),
    ("SmolLM3", [SYSTEM, *THINKING], None, 3),
    ("ChatML", THINKING, None, 1),
    *((name, CALLING, TOOLS, 1) for name in ("Llama 3", "Qwen 2.5")),
    ("Qwen 3", CALLING, None, 2),  # the answers behind one question share a sequence
]


def make(messages: list[dict[str, Any]], tools: Any = None) -> Example:
    example = make_chat(messages, tools)
    assert isinstance(example, Example), example
    return example


@pytest.mark.parametrize(("family", "messages", "tools", "n_sequences"), CASES)
def test_answers_are_those_of_rendering_turn_by_turn(family, messages, tools, n_sequences):
    tokenizer = chat_tokenizer(FAMILIES[family])
    (found,) = encode_chats([make(messages, tools)], tokenizer, "all-turns", None)
    assert taught(found) == turn_by_turn(family, tokenizer, messages, tools)
    assert len(found) == n_sequences


def test_system_words_that_only_the_last_turn_holds():
    """Then no text holds the turns as generation shows them; prompt and answer are put together."""
    tokenizer = chat_tokenizer(FAMILIES["Mistral"])
    messages = [SYSTEM, *PLAIN]
    (found,) = encode_chats([make(messages)], tokenizer, "all-turns", None)
    expected = []
    for i in (2, 4, 6):
        before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True).input_ids
        answer = f" {messages[i]['content']}</s>"
        expected.append((before, tokenizer(answer, add_special_tokens=False).input_ids))
    assert taught(found) == expected and len(found) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_turn_alone(family):
    tokenizer = chat_tokenizer(FAMILIES[family])
    (found,) = encode_chats([make(PLAIN)], tokenizer, "last-turn", None)
    assert taught(found) == turn_by_turn(family, tokenizer, PLAIN)[-1:]


def test_own_marks_are_those_that_transformers_finds():
    tokenizer = chat_tokenizer(FAMILIES["SmolLM3"])
    (((ids, runs),),) = encode_chats([make(PLAIN)], tokenizer, "all-turns", None)
    theirs = tokenizer.apply_chat_template(PLAIN, return_assistant_tokens_mask=True)
    assert ids == theirs["input_ids"][: len(ids)]
    mask = [int(weight) for n, weight in runs for _ in range(n)]
    assert mask == theirs["assistant_masks"][: len(ids)]
    assert not any(theirs["assistant_masks"][len(ids) :])


def test_parts_of_text_are_passed_to_a_template_that_takes_them():
    parts = [{"type": "text", "text": " a "}, {"type": "text", "text": " b "}]
    messages = [{"role": "user", "content": parts}, *turns("x", "Yes?")[1:]]
    for family, said in (("Gemma 3", "ab"), ("ChatML", " a  b "), ("Gemma 2", "a  b")):
        tokenizer = chat_tokenizer(FAMILIES[family])
        (((ids, _),),) = encode_chats([make(messages)], tokenizer, "all-turns", None)
        assert f"user\n{said}<" in tokenizer.decode(ids), family


@pytest.mark.parametrize(
    ("family", "messages", "reason"),
    [
        ("Gemma 2", [SYSTEM, *PLAIN], "refuses the turns system, user, .*: no system role"),
        ("Gemma 2", turns("Hi", "a")[::-1] + turns("Hi", "a"), "refuses the turns .*take turns"),
        ("Llama 2", [*turns("Hi"), *PLAIN], "refuses the turns user, user.*must take turns"),
        ("Qwen 2.5", turns("", "Hi", "a", "b")[1:], "refuses an answer before any other turn: "),
        ("ChatML", CALLING, "leaves out the field 'tool_calls' of a message of the assistant"),
        ("ChatML", [PLAIN[0] | {"name": "Ann"}, *PLAIN[1:]], "the field 'name' of a message"),
    ],
)
def test_what_a_template_refuses_or_leaves_out_is_said(family, messages, reason):
    chats = [make(PLAIN), make(messages), make(PLAIN)]
    found = encode_chats(chats, chat_tokenizer(FAMILIES[family]), "all-turns", None)
    assert found[0] == found[2] and not isinstance(found[0], str)
    assert isinstance(found[1], str)
    assert re.search(reason, found[1]), found[1]


@pytest.mark.parametrize("family", ["Llama 3", "Qwen 2.5", "Qwen 3"])
def test_arguments_of_calls_that_are_json_already_are_written_once(family):
    function = CALL["function"] | {"arguments": json.dumps(CALL["function"]["arguments"])}
    as_json = [m | {"tool_calls": [CALL | {"function": function}]} for m in CALLING[1:2]]
    chats = [make(messages) for messages in (CALLING, [CALLING[0], *as_json, *CALLING[2:]])]
    values, texts = encode_chats(chats, chat_tokenizer(FAMILIES[family]), "all-turns", None)
    assert values == texts and not isinstance(texts, str)


def test_arguments_of_calls_for_a_template_that_wants_json():
    template = FAMILIES["Qwen 2.5"].replace(
        "call.function.arguments} | tojson", "''} | tojson ~ '!' + call.function.arguments"
    )
    chats, tokenizer = [make(CALLING, TOOLS)], chat_tokenizer(template)
    (((ids, _),),) = encode_chats(chats, tokenizer, "all-turns", None)
    assert b'!{"city": "Rome"}</call>' in bytes(i for i in ids if i < 256)


def test_fields_that_a_template_cannot_do_without():
    said = "{{ m.tool_calls[0].function.name if m.role == 'assistant' else m.content }}"
    template = FAMILIES["Zephyr"].replace("{{ m.content }}", said)
    (found,) = encode_chats([make(CALLING[:2])], chat_tokenizer(template), "all-turns", None)
    ((_, answer),) = taught(found)
    assert answer == [*b"find", SPECIAL["</s>"], ord("\n")]


def test_tools_without_a_place_are_refused():
    chats, tokenizer = [make(PLAIN, TOOLS)], chat_tokenizer(FAMILIES["ChatML"])
    (reason,) = encode_chats(chats, tokenizer, "all-turns", None)
    assert "no place for tools" in str(reason)


def test_a_chat_may_begin_with_an_answer():
    tokenizer, messages = chat_tokenizer(FAMILIES["ChatML"]), turns("", "Hi", "a", "b")[1:]
    (((ids, runs),),) = encode_chats([make(messages)], tokenizer, "all-turns", None)
    assert [weight for _, weight in runs] == [0, 1, 0, 1]
    assert ids == tokenizer.apply_chat_template(messages).input_ids
    bare = chat_tokenizer("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    (((ids, runs),),) = encode_chats([make(messages)], bare, "all-turns", SPECIAL["<s>"])
    assert ids == [SPECIAL["<s>"], *bare("Hi</s>a</s>b</s>", add_special_tokens=False).input_ids]
    assert runs == [(1, 0), (3, 1), (2, 0), (2, 1)]


def test_weights_of_turns():
    messages = json.loads(json.dumps(PLAIN))
    messages[1]["weight"], messages[3]["weight"] = 0, 0.25
    tokenizer = chat_tokenizer(FAMILIES["ChatML"])
    (((_, runs),),) = encode_chats([make(messages)], tokenizer, "all-turns", None)
    assert [weight for _, weight in runs] == [0, 0.25, 0, 1]
    (((_, runs),),) = encode_chats([make(messages)], tokenizer, "last-turn", None)
    assert [weight for _, weight in runs] == [0, 0.25, 0, 1]
    del messages[3]["weight"]
    messages[5]["train"] = False
    assert encode_chats([make(messages)], tokenizer, "last-turn", None) == [
        "none of its answers is trained"
    ]
