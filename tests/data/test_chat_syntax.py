"""A template is taken to ask alike behind all turns only where its syntax leaves no other way."""

import pytest
from tests.support.chat_families import FAMILIES
from tests.support.chat_templates import CHATML, chat_tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from swlora.data.chat import ChatTemplate
from swlora.data.chat_answers import trained_texts
from swlora.data.chat_syntax import asks_alike
from swlora.data.examples import Message

ALIKE = {"Llama 3", "Phi-3", "SmolLM2", "ChatML", "Zephyr"}
CONTENT, ASK = "{{ m.content }}", "<|im_start|>assistant\n{% endif %}"


def is_alike(template: str) -> bool:
    return asks_alike(_compile_jinja_template(template).environment.parse(template))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    assert is_alike(FAMILIES[family]) == (family in ALIKE)


@pytest.mark.parametrize(
    "inside",
    [
        "{{ m.content if loop.first else m['content'] }}",
        "{{ messages[0].content ~ m.content }}",
        "{% generation %}{{ m.content }}{% endgeneration %}",
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ m.content }}",
        "{% for c in m.tool_calls %}{{ loop.index }}{% endfor %}{{ loop.previtem }}",
    ],
)
def test_a_loop_that_looks_back_only(inside: str) -> None:
    assert is_alike(CHATML.replace(CONTENT, inside))


@pytest.mark.parametrize(
    "inside",
    [
        "{{ messages[-1].content }}",
        "{{ messages[1].content }}",
        "{{ messages[loop.index0].content }}",
        "{{ messages | length }}",
        "{% set all = messages %}",
        "{% set messages = [] %}",
        "{{ loop.last }}",
        "{{ loop['nextitem'] }}",
        "{{ loop.revindex }}",
        "{% set l = loop %}",
        "{{ loop.changed(messages) }}",
        "{{ m.content if add_generation_prompt }}",
        "{% set bos_token = m.content %}",
    ],
)
def test_a_loop_that_may_look_ahead(inside: str) -> None:
    template = CHATML.replace(CONTENT, inside).replace(ASK, "{{ bos_token }}" + ASK)
    assert template.count(inside) == 1 and not is_alike(template)


@pytest.mark.parametrize(
    ("before", "alike"),
    [
        ("{{ bos_token }}", True),
        ("{% if enable_thinking is defined and not enable_thinking %}-{% endif %}", True),
        ("{{ messages[0].content }}", False),
        ("{{ tools }}", False),
        ("{{ m.content }}", False),
        ("{{ strftime_now('%S') }}", False),
        ("{% for m in messages %}-{% endfor %}", False),
        ("{{ raise_exception('no') }}", False),
    ],
)
def test_what_stands_in_the_generation_prompt(before: str, alike: bool) -> None:
    template = CHATML.replace(ASK, before + ASK)
    assert is_alike(template) == alike
    assert is_alike(f"{{% if messages %}}{template}{{% endif %}}") is False


@pytest.mark.parametrize("family", sorted(ALIKE))
def test_a_known_prompt_is_the_rendered_one(family: str) -> None:
    template = ChatTemplate(chat_tokenizer(FAMILIES[family]))
    for said in ("Hi", "a longer one"):  # the prompts of the second are not rendered
        turns = [Message(("user", "assistant")[i % 2], f"{said} {i}") for i in range(6)]
        (text,) = trained_texts(template, turns, "", [0, 1] * 3)
        prompts = [template.prompt(turns[:i]) for i in (1, 3, 5)]
        assert [text.text[: answer.prompt_end] for answer in text.answers] == prompts
        assert template.known_generation_prompt("")
