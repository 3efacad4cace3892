"""Chats: what is trained is what the template writes, and what it shows for generation."""

import pytest
from tests.support import chat_templates as shapes
from tests.support.chat_templates import SPECIAL, chat_tokenizer
from tests.support.encoding import encode_example

from swlora.data.chat import ChatTemplate, end_of_turn_token
from swlora.data.encode import encode_examples, encode_prompts
from swlora.data.examples import Example
from swlora.errors import DataError, UserError

HI = (("user", "Hi"),)
LONGER = (("user", "Hi"), ("assistant", " Yes? "), ("user", "é"))
THINKING = "<think>\nLong ago.\n</think>\n\nHello"


def encoded(template, turns, answer, **tokens):
    """Return the tokenizer and the texts of what is shown and trained."""
    tokenizer = chat_tokenizer(template, **tokens)
    example = shapes.chat(turns, answer)
    prompt, completion = encode_example(example, "never used", tokenizer)
    assert encode_prompts([example], "never used", tokenizer) == [prompt]
    return tokenizer, prompt, completion


def as_turns(turns, answer=None):
    added = () if answer is None else (("assistant", answer),)
    return [{"role": role, "content": content} for role, content in (*turns, *added)]


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (shapes.GEMMA, "Hello there<end_of_turn>"),
        (shapes.PHI_3, " Hello there <|end|>"),
        (shapes.LLAMA_2, " Hello there </s>"),
        (shapes.LLAMA_3, "Hello there<|eot_id|>"),
        (shapes.CHATML, " Hello there <|im_end|>"),  # whose EOS is </s> here: a base model
        (shapes.ZEPHYR, " Hello there </s>"),
        (shapes.NO_END, " Hello there </s>"),  # nothing to stop at, so EOS
    ],
)
@pytest.mark.parametrize("turns", [HI, LONGER])
def test_the_answer_is_trained_as_the_template_writes_it(template, trained, turns):
    tokenizer, prompt, completion = encoded(template, turns, " Hello there ")
    assert completion == tokenizer(trained, add_special_tokens=False).input_ids
    shown = tokenizer.apply_chat_template(as_turns(turns), add_generation_prompt=True)
    assert prompt == shown.input_ids  # transformers' own, with one BOS at most
    whole = tokenizer.apply_chat_template(as_turns(turns, " Hello there ")).input_ids
    if template != shapes.NO_END:
        assert whole[: len(prompt + completion)] == prompt + completion
        assert end_of_turn_token(tokenizer) == completion[-1]


def test_the_token_that_ends_a_turn():
    assert end_of_turn_token(chat_tokenizer(shapes.NO_END)) is None
    assert end_of_turn_token(chat_tokenizer(None)) is None
    assert end_of_turn_token(chat_tokenizer(shapes.GEMMA)) == SPECIAL["<end_of_turn>"]
    as_text = chat_tokenizer(shapes.CHATML, special=False)  # added, though not as a special token
    assert end_of_turn_token(as_text) == SPECIAL["<|im_end|>"]
    unknown = chat_tokenizer(shapes.CHATML.replace("im_end", "end_of_it"))
    assert end_of_turn_token(unknown) is None  # pieces of text are nothing to stop at
    _, completion = encode_example(shapes.chat(HI, "Hello"), "", unknown)
    assert completion == [*b"Hello", SPECIAL["</s>"]]


def test_an_answer_that_holds_the_end_is_cut_at_its_own_end():
    tokenizer, _, completion = encoded(shapes.CHATML, HI, "say <|im_end|>\nor not")
    text = "say <|im_end|>\nor not<|im_end|>"
    assert completion == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("template", "answer", "trained"),
    [
        (shapes.THINK_PLAIN, THINKING, "Long ago.\n</think>\n\nHello<|im_end|>"),
        (shapes.THINK_PLAIN, "<think>A.</think>B", "A.</think>B<|im_end|>"),
        (shapes.THINK_ALWAYS, THINKING, "Long ago.\n</think>\n\nHello<|im_end|>"),
        (shapes.THINK_ALWAYS, "<think>A.</think>B", "A.\n</think>\n\nB<|im_end|>"),
        (shapes.THINK_ALWAYS, "Hello", "\n</think>\n\nHello<|im_end|>"),
        (shapes.THINK_DROPPED, THINKING, "Long ago.\n</think>\n\nHello<|im_end|>"),
        (shapes.THINK_DROPPED, "A.</think>B", "A.</think>B<|im_end|>"),
        (shapes.THINK_DOUBLED, THINKING, "Long ago.\n</think>\n\nHello<|im_end|>"),
        (shapes.THINK_NEVER, "Hello", "Hello<|im_end|>"),
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
    examples = [Example("q", "a"), shapes.chat(HI, answer)]
    with pytest.raises(DataError, match=f"row 2: the chat template .*{reason}"):
        encode_examples(examples, "", chat_tokenizer(template), context_tokens=200, truncate=False)


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
