"""Tokens of a completion: those that follow the prompt in one text, and nothing put in between."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import chat_templates as shapes
from tests.support.encoding import encode_example
from tests.support.marking_tokenizers import MARK, TOKENIZERS
from transformers import PreTrainedTokenizerFast

from swlora.data.encode import encode_prompts
from swlora.data.examples import Example


def written(ids: list[int], tokenizer: Any) -> str:
    """Return the text of tokens as they are, with every mark as a space."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace(MARK, " ")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_is_put_between_prompt_and_completion(name):
    tokenizer = TOKENIZERS[name]
    core = tokenizer.backend_tokenizer
    for prompt, completion in [
        ("good day\n", "bonjour"),
        ("good day", " bonjour"),
        ("good day.", "bonjour"),
        ("good\n\n", "\nbonjour"),
    ]:
        shown, taught = encode_example(Example(prompt, completion), "", tokenizer)
        whole = core.encode(prompt + completion).ids
        assert shown == core.encode(prompt).ids
        assert [shown] == encode_prompts([Example(prompt, "")], "", tokenizer)
        assert taught[-1] == tokenizer.eos_token_id
        assert shown + taught[:-1] == whole
        assert written(taught[:-1], tokenizer) == completion


@pytest.mark.parametrize("name", TOKENIZERS)
def test_where_a_token_would_reach_over_the_boundary_no_mark_is_added(name):
    tokenizer = TOKENIZERS[name]
    for prompt, completion in [("good ", "day"), ("bon", "jour"), ("a bonj", "our a"), ("1", "2")]:
        _, taught = encode_example(Example(prompt, completion), "", tokenizer)
        assert written(taught[:-1], tokenizer) == completion


PIECES = st.sampled_from([*"adgoy.12' \n", "bonjour", "good", " day"])
LETTERS = st.lists(PIECES, max_size=9).map("".join)
PAIRS = st.tuples(LETTERS, LETTERS.filter(lambda text: text.strip()))


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from(sorted(TOKENIZERS)), pair=PAIRS)
def test_any_completion_has_the_tokens_that_follow_its_prompt(name, pair):
    """Wherever the prompt's tokens begin those of the whole text; elsewhere its own text."""
    tokenizer = TOKENIZERS[name]
    core = tokenizer.backend_tokenizer
    shown, taught = encode_example(Example(*pair), "", tokenizer)
    whole = core.encode("".join(pair)).ids
    assert shown == core.encode(pair[0]).ids
    if whole[: len(shown)] == shown:
        assert taught == [*whole[len(shown) :], tokenizer.eos_token_id]
    elif "'" not in pair[1]:  # which the vocabulary does not have
        assert written(taught[:-1], tokenizer) == pair[1]


@pytest.fixture(scope="module")
def gpt2(shared_dir: Path) -> PreTrainedTokenizerFast:
    file = shared_dir / "gpt2-tokenizer" / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")


@settings(deadline=None, max_examples=300)
@given(pair=st.tuples(LETTERS.filter(bool), PAIRS.map(lambda pair: pair[1])))
def test_byte_level_tokenizers_take_the_short_way_and_give_the_same(gpt2, pair):
    shown, taught = encode_example(Example(*pair), "", gpt2)
    core = gpt2.backend_tokenizer
    whole = core.encode("".join(pair)).ids
    assert shown == core.encode(pair[0]).ids
    follows = whole[: len(shown)] == shown
    expected = whole[len(shown) :] if follows else core.encode(pair[1]).ids
    assert taught == [*expected, gpt2.eos_token_id]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [shapes.LLAMA_2, shapes.CHATML])
def test_chats_have_no_mark_between_their_parts(name, template):
    tokenizer = TOKENIZERS[name]
    tokenizer.chat_template = template
    turns = (("user", "good day"),)
    shown, taught = encode_example(shapes.chat(turns, "bonjour"), "", tokenizer)
    messages = [{"role": "user", "content": "good day"}]
    options = {"add_special_tokens": False}
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer = {"role": "assistant", "content": "bonjour"}
    text = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    assert shown == tokenizer(prompt, **options).input_ids
    whole = tokenizer(text, **options).input_ids
    assert shown + taught == whole
    if template == shapes.LLAMA_2:
        assert written(taught[:-1], tokenizer) == " bonjour "
    else:  # whose <|im_end|> is no token here
        assert written(taught, tokenizer).startswith("bonjour<")
