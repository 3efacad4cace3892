"""Where generation stops in a chat, and what is said of templates before they are trained."""

import pytest
from tests.support import chat_templates as shapes
from tests.support.chat_families import FAMILIES
from tests.support.chat_templates import SPECIAL, chat_tokenizer

from swlora.data.chat import ChatTemplate
from swlora.data.chat_encode import encode_chats
from swlora.data.chat_end import end_of_turn_tokens, notes_on_chats

ENDS = {"Gemma": "<end_of_turn>", "Phi-3": "<|end|>", "Llama 3": "<|eot_id|>"} | dict.fromkeys(
    ("Llama 2", "Mistral", "Zephyr"), "</s>"
)


def calling(end: str) -> str:
    """A template whose calls end in <|end|> each, and then in `end`."""
    calls = "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}<|end|>{% endfor %}"
    return shapes.CHATML.replace(
        "<|im_end|>", f"{{% if m.tool_calls %}}{calls}{end}{{% else %}}<|im_end|>{{% endif %}}"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_that_ends_a_turn_is_trained(family):
    tokenizer = chat_tokenizer(FAMILIES[family])
    end = next((ENDS[name] for name in ENDS if family.startswith(name)), "<|im_end|>")
    assert end_of_turn_tokens(tokenizer) == {SPECIAL[end]}
    chat = shapes.chat((("user", "Hi"), ("assistant", "Yes"), ("user", "So")), "No")
    (sequences,) = encode_chats([chat], tokenizer, "all-turns", None)
    for ids, runs in sequences:
        at = 0
        for n, weight in runs:
            assert not weight or SPECIAL[end] in ids[at : at + n]
            at += n


def test_other_ends():
    assert end_of_turn_tokens(chat_tokenizer(shapes.NO_END)) == set()
    assert end_of_turn_tokens(chat_tokenizer(None)) == set()
    as_text = chat_tokenizer(shapes.CHATML, special=False)  # added, though not as a special token
    assert end_of_turn_tokens(as_text) == {SPECIAL["<|im_end|>"]}
    unknown = chat_tokenizer(shapes.CHATML.replace("im_end", "end_of_it"))
    assert end_of_turn_tokens(unknown) == set()  # pieces of text are nothing to stop at
    # Calls of tools may end in another token than answers; not in that of each call, nor a quote
    answer, call = SPECIAL["<|im_end|>"], SPECIAL["<|eot_id|>"]
    assert end_of_turn_tokens(chat_tokenizer(calling("<|eot_id|>"))) == {answer, call}
    for end in ("", "<|im_end|>", "<|eot_id|>)"):
        assert end_of_turn_tokens(chat_tokenizer(calling(end))) == {answer}


def test_what_only_the_last_turn_has():
    for family, template in FAMILIES.items():
        end = ChatTemplate(chat_tokenizer(template)).end
        assert end.only_last == ("</s>" if family == "Phi-3" else ""), family


def test_what_is_said_of_a_template():
    for family, template in FAMILIES.items():
        notes = notes_on_chats(chat_tokenizer(template))
        assert len(notes) == (family in ("Llama 3", "SmolLM3"))
        assert not notes or "writes the date of the day" in notes[0]
    (note,) = notes_on_chats(chat_tokenizer(shapes.NO_END))
    assert "ends an answer in '\\n\\n', which holds no token to stop at" in note
    marks = "{% generation %}{{ m.content }}{% endgeneration %}"
    marked = shapes.ZEPHYR.replace("{{ m.content }}", marks)
    (note,) = notes_on_chats(chat_tokenizer(marked))
    assert "own marks leave out the token that ends an answer" in note
    assert notes_on_chats(chat_tokenizer("{{ 'a' + 1 }}")) == []
