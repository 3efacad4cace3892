"""Templates for Ollama write what the model's own do, or are refused."""

import pytest
from tests.support import chat_templates as shapes
from tests.support.chat_families import FAMILIES

from swlora.deploy.go_evaluate import evaluate
from swlora.deploy.go_template import GoTemplate, translate
from swlora.errors import UserError

ASK = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "So."}
AGAIN = {"role": "user", "content": 'And "then"?\nYes.'}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = ([ASK], [ASK, ANSWER, AGAIN], [ASK, ANSWER, AGAIN, ANSWER, ASK, ANSWER, AGAIN])
UNEVEN = ("Mistral",)
SYSTEMLESS = ("Gemma 2",)


def writer(template: str):
    tokenizer = shapes.chat_tokenizer(template)

    def write(chat, answer):
        return tokenizer.apply_chat_template(
            list(chat), tokenize=False, add_generation_prompt=answer
        )

    return write


def translated(template: str, bos: str = "<s>") -> GoTemplate:
    return translate(writer(template), bos)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(UNEVEN)))
def test_the_translation_writes_what_the_family_does(family):
    go, write = translated(FAMILIES[family]), writer(FAMILIES[family])
    assert go.has_system == (family not in SYSTEMLESS)
    systems = [[], [SYSTEM]] if go.has_system else [[]]
    for chat in [[*system, *chat] for system in systems for chat in CHATS]:
        assert evaluate(go.text, chat) == write(chat, True).removeprefix("<s>")


def test_a_translation_is_what_a_person_would_write():
    assert translated(shapes.CHATML).text == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}'
        '<|im_end|>\n{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_bos_stays_where_nothing_else_puts_it():
    assert translated(shapes.GEMMA, bos="").text.startswith("<s>{{ range")
    assert translated(shapes.GEMMA, bos="<s>").text.startswith("{{ range")


def test_stripping_is_said_since_go_has_none():
    assert translated(shapes.LLAMA_3).trims
    assert not translated(shapes.CHATML).trims


@pytest.mark.parametrize(
    "template",
    [
        FAMILIES["Mistral"],  # the system's words stand in the last turn
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{% for m in messages if loop.last %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }};{% endfor %}",
        shapes.CHATML.replace("<|im_end|>", '"""'),
        shapes.CHATML.replace("<|im_end|>", "{{ '{{ end }}' }}"),
        shapes.CHATML.replace("<|im_end|>", "\u200b"),
    ],
)
def test_other_templates_are_refused_with_what_to_do(template):
    with pytest.raises(UserError, match="give it with --template FILE"):
        translated(template)


@pytest.mark.parametrize(
    "template",
    ["{{ .Nothing }}", "{{ if .System }}x", "x{{ end }}", "{{ range .Messages }}{{ .System }}"],
)
def test_what_is_not_of_the_language_is_an_error(template):
    with pytest.raises((ValueError, KeyError)):
        evaluate(template, [ASK])
