"""Chats: what is trained is what the template writes, and what it shows for generation."""

from dataclasses import replace

import pytest
from tests.support import chat_templates as shapes
from tests.support.chat_templates import SPECIAL, chat_tokenizer

from swlora.data.chat import ChatTemplate
from swlora.data.chat_encode import encode_chats
from swlora.data.chat_end import end_of_turn_tokens
from swlora.data.encode import encode_examples, encode_prompts
from swlora.data.examples import Example
from swlora.errors import DataError, UserError

HI = (("user", "Hi"),)
LONGER = (("user", "Hi"), ("assistant", " Yes? "), ("user", "é"))
THINKING = "<think>\nLong ago.\n</think>\n\nHello"


def as_turns(turns, answer=None):
    added = () if answer is None else (("assistant", answer),)
    return [{"role": role, "content": content} for role, content in (*turns, *added)]


def encoded(template, turns, answer, **tokens):
    """Return the tokenizer, and the tokens that are shown and trained for the last answer."""
    tokenizer = chat_tokenizer(template, **tokens)
    example = shapes.chat(turns, answer)
    ((sequence,),) = encode_chats([example], tokenizer, "last-turn", None)
    ids, ((n_prompt, _), _) = sequence
    assert encode_prompts([example], "never used", tokenizer) == [ids[:n_prompt]]
    return tokenizer, ids[:n_prompt], ids[n_prompt:]


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (shapes.GEMMA, "Hello there<end_of_turn>\n"),
        (shapes.PHI_3, " Hello there <|end|>\n</s>"),
        (shapes.LLAMA_2, " Hello there </s>"),
        (shapes.LLAMA_3, "Hello there<|eot_id|>"),
        (shapes.CHATML, " Hello there <|im_end|>\n"),  # whose EOS is </s> here: a base model
        (shapes.ZEPHYR, " Hello there </s>\n"),
        (shapes.NO_END, " Hello there \n\n"),
    ],
)
@pytest.mark.parametrize("turns", [HI, LONGER])
def test_the_answer_is_trained_as_the_template_writes_it(template, trained, turns):
    tokenizer, prompt, completion = encoded(template, turns, " Hello there ")
    assert completion == tokenizer(trained, add_special_tokens=False).input_ids
    shown = tokenizer.apply_chat_template(as_turns(turns), add_generation_prompt=True)
    assert prompt == shown.input_ids  # transformers' own, with one BOS at most
    whole = tokenizer.apply_chat_template(as_turns(turns, " Hello there ")).input_ids
    assert whole == prompt + completion
    if template != shapes.NO_END:
        assert end_of_turn_tokens(tokenizer) & set(completion)


def test_an_answer_that_holds_the_end_is_trained_whole():
    tokenizer, _, completion = encoded(shapes.CHATML, HI, "say <|im_end|>\nor not")
    text = "say <|im_end|>\nor not<|im_end|>\n"
    assert completion == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("template", "answer", "trained"),
    [
        (shapes.THINK_PLAIN, THINKING, "Long ago.\n</think>\n\nHello<|im_end|>\n"),
        (shapes.THINK_PLAIN, "<think>A.</think>B", "A.</think>B<|im_end|>\n"),
        (shapes.THINK_ALWAYS, THINKING, "Long ago.\n</think>\n\nHello<|im_end|>\n"),
        (shapes.THINK_ALWAYS, "<think>A.</think>B", "A.\n</think>\n\nB<|im_end|>\n"),
        (shapes.THINK_ALWAYS, "Hello", "\n</think>\n\nHello<|im_end|>\n"),
        (shapes.THINK_DROPPED, THINKING, "Long ago.\n</think>\n\nHello<|im_end|>\n"),
        (shapes.THINK_DROPPED, "A.</think>B", "A.</think>B<|im_end|>\n"),
        (shapes.THINK_DOUBLED, THINKING, "Long ago.\n</think>\n\nHello<|im_end|>\n"),
        (shapes.THINK_NEVER, "Hello", "Hello<|im_end|>\n"),
    ],
)
def test_reasoning_is_opened_once_and_closed(template, answer, trained):
    for turns in (HI, LONGER):
        tokenizer, prompt, completion = encoded(template, turns, answer)
        assert completion == tokenizer(trained, add_special_tokens=False).input_ids
        text = tokenizer.decode(prompt + completion).rpartition("assistant\n")[2]
        assert text.count("<think>") == text.count("</think>") == 1


@pytest.mark.parametrize(
    ("template", "answer", "reason"),
    [
        (shapes.THINK_PLAIN, "Hello", "opens <think> before an answer, and this answer does not"),
        (shapes.THINK_DROPPED, "Hello", "begin it with a block of <think>"),
        (shapes.THINK_DOUBLED, "Hello", "opens <think> before an answer"),
        (shapes.THINK_PLAIN, "<think>\nNo end", "opens <think> before an answer"),
        (shapes.THINK_NEVER, THINKING, "in one way for generation"),
        (shapes.THINK_ALWAYS, f"Lost. {THINKING}", "leaves out or changes a part of the answer"),
        (shapes.CHATML.replace("m.content", "m.content.split('>')[-1]"), THINKING, "leaves out"),
        (shapes.CHATML.replace("m.content", "'A secret'"), "Hello", "leaves out or changes"),
        (
            shapes.CHATML.replace("m.content", "messages | length ~ m.content"),
            "Hello",
            r"\(ending in '.*assistant\\n'\) and in another when the answer follows",
        ),
    ],
)
def test_what_cannot_be_trained_where_it_is_generated_is_refused_by_row(template, answer, reason):
    chat = replace(shapes.chat(HI, answer), source="chats.jsonl, line", number=7)
    examples, tokenizer = [Example("q", "a"), chat, Example("r", "b")], chat_tokenizer(template)
    place = "^chats.jsonl, line 7: the chat template"
    said = f"{place} .*{reason}.*; --skip-bad-rows leaves it out"
    with pytest.raises(DataError, match=said) as refused:
        encode_examples(examples, "", tokenizer, context_tokens=200, truncate=False)
    encoded = encode_examples(
        examples, "", tokenizer, context_tokens=200, truncate=False, skip_bad_rows=True
    )
    assert encoded.example_ids.tolist() == [0, 2]
    ((kind, n),) = encoded.bad.items()
    assert n == 1 and f"line 7: {kind}" in str(refused.value)


def test_system_words_that_only_a_last_turn_holds_are_shown_as_in_generation():
    turns = (("system", "Be brief."), *LONGER)
    tokenizer, prompt, completion = encoded(shapes.SYSTEM_IN_THE_LAST_TURN, turns, "Hello")
    assert tokenizer.decode(prompt).endswith("[INST] Be brief.\n\né[/INST]")
    assert completion == [*b" Hello", SPECIAL["</s>"]]


def test_a_role_that_the_template_refuses_is_named():
    turns = (("system", "Be brief."), *HI)
    with pytest.raises(UserError, match="refuses the turns system, user: no system role"):
        ChatTemplate(chat_tokenizer(shapes.GEMMA)).prompt(shapes.chat(turns).messages)
    with pytest.raises(UserError, match="refuses the turns user: can only concatenate"):
        ChatTemplate(chat_tokenizer("{{ 'a' + 1 }}")).prompt(shapes.chat(HI).messages)
