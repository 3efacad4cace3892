"""A chat template that works or writes beyond all measure: one line, and soon."""

import copy
from typing import Any

import pytest

from swlora.data import chat_bounds
from swlora.data.chat import ChatTemplate
from swlora.data.encode import encode_examples, encode_turns
from swlora.data.examples import Example, Message
from swlora.errors import DataError, UserError

TURNS = (Message("user", "Hi"), Message("assistant", "Hello"))
PLAIN = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content + '\\n' }}{% endfor %}"
SLOW = "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(22) }}"
DOUBLED = (
    "{% set s = namespace(t='ab') %}{% for i in range(14) %}{% set s.t = s.t ~ s.t %}{% endfor %}"
)


@pytest.fixture
def with_template(tiny_tokenizer):
    def make(source: str) -> Any:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = source
        return tokenizer

    return make


@pytest.mark.parametrize("source", [SLOW, CALLS])
@pytest.mark.parametrize("place", ["in front", "behind"])
def test_a_template_that_takes_too_long(source, place, with_template, monkeypatch):
    monkeypatch.setattr(chat_bounds, "MAX_RENDER_S", 0.05)
    whole = source + PLAIN if place == "in front" else PLAIN + source
    tokenizer = with_template(whole)
    expected = "the chat template refuses the turns user.*: it takes more than 0.05 s for a chat"
    with pytest.raises(UserError, match=expected):
        encode_turns(TURNS[:1], tokenizer)
    chat = Example.chat(TURNS)
    with pytest.raises(DataError, match=r"row 1: the chat template .*: it takes more than 0.05 s"):
        encode_examples([chat], "", tokenizer, context_tokens=99, truncate=False)


@pytest.mark.parametrize(
    "source",
    [
        DOUBLED,
        "{{ 'abcd' * 1000 }}",
        "{{ 1000 * [1, 2] }}",
        "{% set n = 9999 %}{{ 7 ** n }}",
        "{{ range(2000) | list }}",
        "{{ 'ab'.ljust(2000) }}",
        "{% for a in range(1000) %}abc{% endfor %}",
    ],
)
def test_a_template_that_makes_too_much(source, with_template, monkeypatch):
    monkeypatch.setattr(chat_bounds, "MAX_VALUE_SIZE", 1000)
    with pytest.raises(UserError, match=r"the chat template refuses .*: it (makes|writes)"):
        encode_turns(TURNS[:1], with_template(source + PLAIN))


def test_others_write_what_they_wrote(with_template):
    source = (
        "{% for m in messages if m.role != 'x' recursive %}{{ loop.index }}/{{ loop.length }}"
        "{{ loop.last }}{{ (m.content * 2)|trim|upper }}{{ 2 ** 5 % 3 }}{{ 'a' ~ m.role }}"
        "{% endfor %}{% for a, b in {'k': 1}.items() %}{{ a ~ b }}{% else %}none{% endfor %}"
    )
    tokenizer = with_template(source)
    unbounded = with_template(source + "{# #}")  # is compiled by itself
    turns = [{"role": t.role, "content": t.content} for t in TURNS]
    expected = unbounded.apply_chat_template(turns, tokenize=False)
    (ours,) = ChatTemplate(tokenizer).render([TURNS], "", generation_prompt=False)
    assert ours.text == expected == "1/2FalseHIHI2auser2/2TrueHELLOHELLO2aassistantk1"
