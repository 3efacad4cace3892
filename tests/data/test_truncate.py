"""What is left of rows that are too long: the answer, and of the prompt what fits beside it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.chat_families import FAMILIES
from tests.support.chat_templates import chat_tokenizer
from tests.support.tokenizers import EOS, byte_tokenizer

from swlora.data.encode import Encoded, encode_examples, encode_prompts
from swlora.data.examples import Example, Message
from swlora.data.truncate import cut
from swlora.errors import DataError


def texts(encoded: Encoded) -> list[tuple[list[int], list[int]]]:
    """Return (ids, ids that are trained) of every sequence."""
    sequences, found = encoded.sequences, []
    for i in range(len(sequences)):
        part = slice(sequences.offsets[i], sequences.offsets[i + 1])
        ids, weights = sequences.tokens[part].tolist(), sequences.weights[part].tolist()
        found.append((ids, [id_ for id_, weight in zip(ids, weights, strict=True) if weight]))
    return found


@pytest.mark.parametrize(
    ("prompt", "completion", "kept_prompt", "kept_completion"),
    [
        ("abc", "wxyz", "abc", [*b"wxyz", EOS]),  # 8 tokens: fits
        ("abcd", "wxyz", "abd", [*b"wxyz", EOS]),
        ("abcdefghijk", "wxyz", "abk", [*b"wxyz", EOS]),
        ("abcdefghijk", "wxyz12", "ak", [*b"wxyz12"]),  # a quarter of the context is the prompt's
        ("a", "wxyz1234", "a", [*b"wxyz123"]),
        ("ab", "wxyz" * 9, "ab", [*b"wxyzwx"]),
    ],
)
def test_pairs(prompt: str, completion: str, kept_prompt: str, kept_completion: list[int]) -> None:
    examples = [Example("k", "v"), Example(prompt, completion)]
    found = encode_examples(examples, "", byte_tokenizer(), context_tokens=8, truncate=True)
    kept = [*kept_prompt.encode(), *kept_completion]
    assert texts(found) == [([*b"kv", EOS], [*b"v", EOS]), (kept, kept_completion)]
    whole = [*prompt.encode(), *completion.encode(), EOS]
    assert found.n_cut == (kept != whole)


@given(
    n_prompt=st.integers(1, 30),
    runs=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.0, 0.5, 1.0])), max_size=5),
    context_tokens=st.integers(2, 20),
)
def test_a_cut_sequence_fits_and_keeps_its_first_trained_token(
    n_prompt: int, runs: list[tuple[int, float]], context_tokens: int
) -> None:
    runs = [(n_prompt, 0.0), (1, 1.0), *runs]
    ids = list(range(sum(n for n, _ in runs)))
    kept, left = cut((ids, runs), context_tokens)
    assert len(kept) == min(len(ids), context_tokens) == sum(n for n, _ in left)
    assert kept == sorted(kept) and kept[0] == 0
    weight_of = [weight for n, weight in runs for _ in range(n)]
    assert [weight_of[i] for i in kept] == [weight for n, weight in left for _ in range(n)]
    assert n_prompt in kept and (n_prompt - 1 in kept or context_tokens < 8)


def chat(n_turns: int, *, system: bool) -> Example:
    turns = [Message("system", "S" * 4)] if system else []
    for i in range(n_turns):
        turns += [Message("user", f"question {i}"), Message("assistant", f"answer {i}")]
    return Example.chat(turns)


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("family", ["ChatML", "Llama 3", "Mistral"])
def test_a_chat_loses_its_oldest_turns(family: str, system: bool) -> None:
    """What is left is encoded as if the chat had begun there; one turn more does not fit."""
    tokenizer = chat_tokenizer(FAMILIES[family])
    whole, long = chat(9, system=system), 0

    def encoded(example: Example, context: int, **options: Any) -> Encoded:
        return encode_examples([example], "", tokenizer, context_tokens=context, **options)

    for n_left in (8, 3, 1):
        first = 2 * (9 - n_left) + system
        rest = Example.chat((*whole.messages[:system], *whole.messages[first:]))
        expected = encoded(rest, 10_000, truncate=False)
        context = int(expected.sequences.lengths.max())
        found = encoded(whole, context, truncate=True)
        assert texts(found) == texts(expected)
        assert found.n_cut == 1
        long = max(long, context)
    with pytest.raises(DataError, match="--truncate cuts them"):
        encoded(whole, long, truncate=False)


def test_the_last_turn_alone_is_cut_in_its_middle() -> None:
    tokenizer = chat_tokenizer(FAMILIES["ChatML"])
    example = Example.chat([Message("user", "abc" * 100), Message("assistant", "The answer.")])
    whole = encode_examples([example], "", tokenizer, context_tokens=9_999, truncate=True)
    ((ids, answer),) = texts(whole)
    found = encode_examples([example], "", tokenizer, context_tokens=len(ids) - 40, truncate=True)
    ((kept, kept_answer),) = texts(found)
    assert kept_answer == answer and len(kept) == len(ids) - 40
    assert kept[:20] == ids[:20] and kept[-20:] == ids[-20:]


def test_the_last_answer_stays_behind_a_long_answer_of_a_tool() -> None:
    """A call is trained too where there is room; here only what the tool said is cut."""
    tokenizer = chat_tokenizer(FAMILIES["ChatML"])
    turns = [("user", "Q"), ("assistant", "call"), ("tool", "T" * 300), ("assistant", "FINAL")]
    example = Example.chat(Message(role, content) for role, content in turns)

    def encoded(context_tokens: int) -> list[tuple[list[int], list[int]]]:
        return texts(
            encode_examples([example], "", tokenizer, context_tokens=context_tokens, truncate=True)
        )

    ((whole, trained),) = encoded(9_999)
    assert bytes(t for t in trained if t < 256) == b"call\nFINAL\n"
    ((kept, trained),) = encoded(100)
    assert bytes(t for t in trained if t < 256) == b"FINAL\n"
    assert len(kept) == 100 and (kept[:40], kept[-40:]) == (whole[:40], whole[-40:])


def test_turns_are_only_left_out_before_what_is_trained() -> None:
    """The first answer alone is trained: its question is cut instead."""
    tokenizer = chat_tokenizer(FAMILIES["ChatML"])
    turns = list(chat(3, system=False).messages)
    turns[0] = Message("user", "abc" * 100)
    turns[3], turns[5] = (Message("assistant", "x", 0.0) for _ in range(2))
    example = Example.chat(turns)
    ((ids, answer),) = texts(
        encode_examples([example], "", tokenizer, context_tokens=9_999, truncate=False)
    )
    found = encode_examples([example], "", tokenizer, context_tokens=90, truncate=True)
    ((kept, kept_answer),) = texts(found)
    assert (kept_answer, len(kept), kept[:20]) == (answer, 90, ids[:20])


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("family", ["ChatML", "Llama 3", "Mistral", "Gemma 3"])
def test_a_prompt_to_generate_for_loses_its_oldest_turns_too(family: str, system: bool) -> None:
    """It is the prompt of a chat that begins later; only the last question loses its middle."""
    tokenizer = chat_tokenizer(FAMILIES[family])
    whole = chat(9, system=system)

    def prompt(example: Example, most_tokens: int | None = None) -> list[int]:
        (ids,) = encode_prompts([example], "", tokenizer, most_tokens=most_tokens)
        return ids

    assert prompt(whole, len(prompt(whole))) == prompt(whole)
    for n_left in (8, 3, 1):
        first = 2 * (9 - n_left) + system
        rest = prompt(Example.chat((*whole.messages[:system], *whole.messages[first:])))
        assert prompt(whole, len(rest)) == prompt(whole, len(rest) + 1) == rest
    short = prompt(whole, len(rest) - 5)
    n_head = (len(short) + 1) // 2
    assert short == [*rest[:n_head], *rest[n_head + 5 :]]


def test_a_cut_prompt_asks_what_its_completion_answers() -> None:
    """An answer of weight 0 behind it, and the question to that, are no part of the prompt."""
    tokenizer = chat_tokenizer(FAMILIES["ChatML"])
    asked = chat(3, system=False)
    disliked = (Message("user", "And then?"), Message("assistant", "No.", trained=0.0))
    whole = Example.chat((*asked.messages, *disliked))
    assert whole.completion == asked.completion
    (uncut,) = encode_prompts([asked], "", tokenizer)
    for most_tokens in (len(uncut), len(uncut) // 2, 20):  # of the last, only a question fits
        prompts = [
            encode_prompts([example], "", tokenizer, most_tokens=most_tokens)
            for example in (whole, asked)
        ]
        assert prompts[0] == prompts[1]


def test_a_plain_prompt_to_generate_for_loses_its_middle() -> None:
    examples = [Example("abcdefghijk", "x"), Example("abc", "x")]
    found = encode_prompts(examples, "\n", byte_tokenizer(), most_tokens=5)
    assert found == [[*b"abck\n"], [*b"abc\n"]]
