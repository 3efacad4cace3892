"""One rendering in place of many: the same result, and no trust in a template that looks ahead."""

import random
from typing import Any

import pytest
from tests.support import chat_templates as shapes
from tests.support.chat_families import FAMILIES
from tests.support.chat_templates import chat_tokenizer

from swlora.data import chat as chat_module
from swlora.data.chat import ChatTemplate
from swlora.data.chat_answers import trained_texts
from swlora.data.chat_encode import encode_chats
from swlora.data.examples import Example, Message

# Templates that know of later turns before they write: each in another way
LOOKS_AHEAD = {
    "the number": ("m.content", "messages | length ~ m.content"),
    "the last turn": ("m.content", "(messages | last).content ~ m.content"),
    "the last turn by number": ("m.content", "messages[-1].content ~ m.content"),
    "whether a turn is the last": ("m.content", "loop.last ~ m.content"),
    "the next turn": ("m.content", "(loop.nextitem.role if loop.nextitem) ~ m.content"),
    "how many are left": ("m.content", "loop.revindex ~ m.content"),
    "from behind": ("m.content", "(messages[::-1][0]).content ~ m.content"),
    "all of them": ("{% for m", "{{ messages | map(attribute='role') | join }}{% for m"),
    "as they are": ("m.content", "(messages | string | length) ~ m.content"),
    "as JSON": ("m.content", "(messages | list | tojson) ~ m.content"),
}


def chats(n: int, *, system: bool = True) -> list[Example]:
    """Chats of one to four answers with spaces, headers and reasoning in what is said."""
    rng = random.Random(n)
    said = ["Hi", " So ", "<|im_start|>assistant\n", "x\n\ny", "<think>\nA\n</think>\n\nB", "é"]
    found = []
    for i in range(n):
        turns = [Message("system", "Be brief.")] if system and i % 3 else []
        for _ in range(rng.randint(1, 4)):
            weight = rng.choice([None, None, 0.0, 0.5])
            turns.append(Message("user", rng.choice(said)))
            turns.append(Message("assistant", rng.choice(said), weight))
        found.append(Example.chat(turns))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, examples = chat_tokenizer(FAMILIES[family]), chats(40)
    found = encode_chats(examples, tokenizer, "all-turns", None)
    monkeypatch.setattr(ChatTemplate, "trace", lambda *_: None)
    assert found == encode_chats(examples, tokenizer, "all-turns", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_that_writes_turn_by_turn_is_rendered_a_few_times(family, monkeypatch) -> None:
    n, render = 0, ChatTemplate.render

    def counted(self: ChatTemplate, chats: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal n
        n += len(chats)
        return render(self, chats, *arguments, **options)

    chat = ChatTemplate(chat_tokenizer(FAMILIES[family]))
    turns = [Message(("user", "assistant")[i % 2], f"{i}!") for i in range(8)]
    assert chat.end
    monkeypatch.setattr(ChatTemplate, "render", counted)
    for _ in range(20):
        trained_texts(chat, turns, "", [0, 1] * 4)
    # These look at all roles first, or at the last turn
    looks_ahead = {"Gemma 2", "Gemma 3", "Llama 2", "Mistral", "Qwen 3", "SmolLM3"}
    usual = 20 * 4 if family == "Qwen 2.5" else 1  # the former looks at the next turn's role
    in_vain = chat_module._TRACES * (4 if family == "SmolLM3" else 2)  # whose prompts are alike
    assert n == (20 * 8 + in_vain if family in looks_ahead else usual)


@pytest.mark.parametrize(("said", "instead"), LOOKS_AHEAD.values(), ids=LOOKS_AHEAD)
def test_a_template_that_looks_ahead_is_not_believed(said, instead, monkeypatch) -> None:
    template = shapes.ZEPHYR.replace(said, instead)
    assert template != shapes.ZEPHYR
    chat = ChatTemplate(chat_tokenizer(template))
    turns = [Message(("user", "assistant")[i % 2], f"{i}!") for i in range(4)]
    traced = chat.trace(turns, "")
    assert traced is None or traced.begins[3] < traced.text.index("2!")


def test_a_generation_prompt_that_knows_the_first_turn() -> None:
    """It is not what the template writes before an answer, so such a chat is refused each time."""
    template = shapes.CHATML.replace(
        "<|im_start|>assistant\n{% endif %}",
        "{{ '!' if messages[0].content == 'odd' }}<|im_start|>assistant\n{% endif %}",
    )
    answer = Message("assistant", "Yes")
    usual, odd = (Example.chat([Message("user", said), answer]) for said in ("Hi", "odd"))
    found = encode_chats([*[usual] * 9, odd], chat_tokenizer(template), "all-turns", None)
    assert [isinstance(plan, str) for plan in found] == [False] * 9 + [True]


@pytest.mark.parametrize(
    "known",
    ["messages[-1].content", "(messages | last).content", "m.content", "seen.content"],
)
def test_a_generation_prompt_that_knows_a_question_in_the_middle(known: str, monkeypatch) -> None:
    """The prompts of the first and of the last answer say nothing of it."""
    template = (
        "{% set seen = namespace(content='') %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set seen.content = m.content %}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{% for m in messages %}{% if loop.last %}"
        f"{{{{ '!' if {known} == 'odd' }}}}{{% endif %}}{{% endfor %}}"
        "<|im_start|>assistant\n{% endif %}"
    )
    tokenizer, answer = chat_tokenizer(template), Message("assistant", "Yes")
    rows = [
        Example.chat(turn for said in questions for turn in (Message("user", said), answer))
        for questions in (("Hi", "odd", "So"), ("Hi", "So", "So"))
    ]
    refused, taken = encode_chats(rows, tokenizer, "all-turns", None)
    assert "in one way for generation" in refused and not isinstance(taken, str)
    monkeypatch.setattr(ChatTemplate, "trace", lambda *_: None)
    assert encode_chats(rows, tokenizer, "all-turns", None) == [refused, taken]


ENDS = {
    "by the next role": (
        "{{ m.content }}{% if loop.last or messages[loop.index0 + 1].role != 'assistant' %}"
        "<|im_end|>\n{% endif %}"
    ),
    "whichever comes": (
        "{{ m.content }}{% if loop.last %}<|im_end|>{% else %}<|im_end|>\n{% endif %}"
    ),
}


@pytest.mark.parametrize("ending", ENDS.values(), ids=ENDS)
def test_an_end_behind_a_look_at_the_next_turn_is_trained(ending: str, monkeypatch) -> None:
    """The look comes before the end of the turn itself is written."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + ending
        + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer, examples = chat_tokenizer(template), chats(12)
    found = encode_chats(examples, tokenizer, "all-turns", None)
    monkeypatch.setattr(ChatTemplate, "trace", lambda *_: None)
    assert found == encode_chats(examples, tokenizer, "all-turns", None)


CALL = '{"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}'


@pytest.mark.parametrize("first", [False, True])
def test_a_row_is_taken_or_refused_whatever_stands_before_it(first: bool) -> None:
    """Here calls are written alone only, and tools where there is a system turn."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.role == 'system' and tools %}{{ tools | tojson }}{% endif %}"
        "{% if m.tool_calls and not m.content %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    asked, answer = Message("user", "Q"), Message("assistant", "A")
    system = Message("system", "S")
    called, looked = (Message("assistant", text, extra=CALL) for text in ("", "I look"))
    tools = '[{"name": "f"}]'
    good = [Example.chat([asked, called]), Example.chat([system, asked, answer], tools)]
    bad = [Example.chat([asked, looked]), Example.chat([asked, answer], tools)]
    rows = [*(good if first else []), *bad]
    *taken, no_call, no_tools = encode_chats(rows, chat_tokenizer(template), "all-turns", None)
    assert not any(isinstance(found, str) for found in taken)
    assert "leaves out the field 'tool_calls'" in no_call and "no place for tools" in no_tools
