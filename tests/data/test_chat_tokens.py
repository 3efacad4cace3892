"""Answers of chats are trained behind the tokens that generation would see, in any tokenizer."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.chat_families import FAMILIES, taught
from tests.support.chat_templates import SPECIAL, chat_tokenizer
from tests.support.marking_tokenizers import TOKENIZERS
from tokenizers import AddedToken
from transformers import BatchEncoding, PreTrainedTokenizerFast

from swlora.data import tokenise
from swlora.data.chat_encode import encode_chats
from swlora.data.examples import Example, Message

# What stands before and behind what is said: tokens would reach over the one or the other
HEADERS = {
    "two line breaks": ("%:\n\n", "\n\n"),
    "a space": ("%: ", "\n"),
    "no space": ("<s>%", "</s>"),
    "letters": ("bon", "day"),
    "a special token": ("<|im_start|>%\n\n", "<|im_end|>\n"),
}


def template_of(before: str, behind: str) -> str:
    asks = before.replace("%", "assistant")
    turn = before.replace("%", "{{ m.role }}") + "{{ m.content }}" + behind
    ask = f"{{{{ {asks!r} if add_generation_prompt }}}}"
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{ask}"


TEMPLATES = {name: FAMILIES[name] for name in ("Llama 2", "Llama 3", "Qwen 3", "ChatML")} | {
    name: template_of(*header) for name, header in HEADERS.items()
}
NAMES = (*TOKENIZERS, "gpt2", "gpt2, special", "special, swallowing")
WORDS = st.sampled_from(["a", "d", "go", ".", " ", "\n", "bonjour", " day", "1"])
SAID = st.lists(WORDS, min_size=1, max_size=6).map("".join).filter(str.strip)


@pytest.fixture(scope="module")
def tokenizers(shared_dir: Path) -> dict[str, Any]:
    file = shared_dir / "gpt2-tokenizer" / "tokenizer.json"
    gpt2 = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    special = copy.deepcopy(gpt2)
    special.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    swallowing = copy.deepcopy(TOKENIZERS["prepend"])
    swallowing.add_tokens(
        [AddedToken(text, special=True, rstrip=True) for text in ("<|im_start|>", "<|im_end|>")]
    )
    return {**TOKENIZERS, "gpt2": gpt2, "gpt2, special": special, "special, swallowing": swallowing}


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(NAMES),
    template=st.sampled_from(sorted(TEMPLATES)),
    said=st.lists(SAID, min_size=4, max_size=4),
)
def test_answers_follow_the_tokens_of_their_prompts(tokenizers, name, template, said):
    tokenizer = tokenizers[name]
    tokenizer.chat_template = TEMPLATES[template]
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    (found,) = encode_chats([Example.chat(turns)], tokenizer, "all-turns", tokenizer.eos_token_id)
    assert not isinstance(found, str), found
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    ids_of = partial(tokenizer.encode, add_special_tokens=False)
    answers = taught(found)
    assert len(answers) == 2
    for i, (before, answer) in zip((1, 3), answers, strict=True):
        write = partial(tokenizer.apply_chat_template, tokenize=False)
        prompt = write(messages[:i], add_generation_prompt=True)
        whole = write(messages[: i + 1])
        assert before == ids_of(prompt)
        if ids_of(whole)[: len(before)] == before:
            assert answer == ids_of(whole)[len(before) :]
        else:
            pieces = "".join(tokenizer.convert_ids_to_tokens(answer))
            assert tokenizer.decode(before + answer) == tokenizer.decode(ids_of(whole)), pieces


@pytest.mark.parametrize("n_bytes", [0, 300])
def test_parts_change_nothing(n_bytes, monkeypatch):
    tokenizer = chat_tokenizer(FAMILIES["Qwen 3"])
    turns = [Message(("user", "assistant")[i % 2], str(i)) for i in range(8)]
    chats = [Example.chat(turns[: 2 + 2 * (i % 4)]) for i in range(9)]
    chats.insert(4, Example.chat([turns[0], Message("assistant", "Hi", extra='{"mood": 1}')]))
    found = encode_chats(chats, tokenizer, "all-turns", None)
    assert [i for i, plan in enumerate(found) if isinstance(plan, str)] == [4]
    monkeypatch.setattr(tokenise, "BYTES_AT_ONCE", n_bytes)
    assert encode_chats(chats, tokenizer, "all-turns", None) == found
    assert encode_chats([], tokenizer, "all-turns", None) == []


def test_a_worker_can_do_it():
    """The function, its tokenizer and its result travel between processes."""
    tokenizer = chat_tokenizer(FAMILIES["Qwen 3"])
    chat = Example.chat([Message("user", "Hi"), Message("assistant", "Yes")])
    work = partial(encode_chats, [chat], tokenizer, "all-turns", None)
    assert pickle.loads(pickle.dumps(work())) == work() == pickle.loads(pickle.dumps(work))()


def test_tokenizers_written_in_python_have_a_sequence_for_each_answer():
    tokenizer = chat_tokenizer(FAMILIES["ChatML"])
    turns = [Message(("user", "assistant")[i % 2], "Hi") for i in range(4)]
    fast = encode_chats([Example.chat(turns)], tokenizer, "all-turns", None)
    slow = encode_chats([Example.chat(turns)], WrittenInPython(tokenizer), "all-turns", None)
    assert taught(fast[0]) == taught(slow[0])
    assert (len(fast[0]), len(slow[0])) == (1, 2)


class WrittenInPython:
    """A tokenizer that says no more of a text than its tokens."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return BatchEncoding(dict(self._tokenizer(*arguments, **options)))
