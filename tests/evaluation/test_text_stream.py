"""Incremental text: whole characters, stop texts, and the same text in the end."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swlora.evaluation.text_stream import Detokeniser, StopFilter

TEXTS = [
    "plain",
    "Žluťoučký kůň, 10 £",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🏳️‍🌈 family 👨‍👩‍👧",
    "語 " * 9,
    "a�b�",  # written by the model itself
]


def pieces(tokenizer, ids, prompt_ids=()) -> list[str]:
    stream = Detokeniser(tokenizer, prompt_ids)
    return [*(stream.add(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_split(tiny_tokenizer, text):
    ids = list(text.encode())  # a token a byte
    found = pieces(tiny_tokenizer, ids)
    assert "".join(found) == text
    if "�" not in text:
        assert not any("�" in piece for piece in found)


@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.integers(0, 257), max_size=60))
def test_the_pieces_of_any_bytes_make_the_whole_text(tiny_tokenizer, ids):
    whole = tiny_tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces(tiny_tokenizer, ids, list(b"before"))) == whole


def test_bytes_that_never_make_a_character_are_given_out_in_the_end(tiny_tokenizer):
    stream = Detokeniser(tiny_tokenizer)
    given_out = [stream.add(0xFF) for _ in range(200)]
    assert sum(map(len, given_out)) > 100
    assert len("".join(given_out) + stream.finish()) == 200


def test_a_prompt_that_ends_in_half_a_character_is_no_context(tiny_tokenizer):
    half, rest = "語".encode()[:2], "語x".encode()[2:]
    found = "".join(pieces(tiny_tokenizer, list(rest), list(half)))
    assert found == tiny_tokenizer.decode(list(rest))


def test_the_space_of_a_sentencepiece_word_survives():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"▁good": 0, "▁day": 1, "s": 2, "?": 3}, unk_token="?"))
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    assert tokenizer.decode([1, 2]) == "days"  # alone, a word loses its space
    assert pieces(tokenizer, [1, 2, 0], [0]) == [" day", "s", " good", ""]


def filtered(text_pieces, stops) -> tuple[list[str], bool]:
    stream = StopFilter(stops)
    out = [stream.add(piece) for piece in text_pieces]
    return [*out, stream.finish()], stream.stopped


def test_a_stop_text_is_cut_off_wherever_the_pieces_end():
    for cut in range(len("one END two")):
        found = filtered(["one END two"[:cut], "one END two"[cut:]], ["END"])
        assert ("".join(found[0]), found[1]) == ("one ", True)


def test_what_may_become_a_stop_text_is_held_back_and_no_more():
    assert filtered(["xE", "N", "x"], ["END"]) == (["x", "", "ENx", ""], False)
    assert filtered(["ENEN", "D"], ["END"]) == (["EN", "", ""], True)
    assert filtered(["the EN"], ["END"]) == (["the ", "EN"], False)


def test_the_first_of_several_stop_texts_counts():
    assert filtered(["a b c"], ["c", "b"]) == (["a ", ""], True)
    assert filtered(["a", "bc"], ["abcd", "b"]) == (["", "a", ""], True)


@settings(deadline=None)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    seed=st.integers(0, 999),
)
def test_any_text_is_cut_at_the_first_stop(text, stops, seed):
    cuts = random.Random(seed)
    text_pieces, rest = [], text
    while rest:
        n = cuts.randint(1, 4)
        text_pieces.append(rest[:n])
        rest = rest[n:]
    found = [text.index(stop) for stop in stops if stop in text]
    out, stopped = filtered(text_pieces, stops)
    # Where stop texts overlap, the one that is complete first counts.
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(found)
    if not found:
        assert "".join(out) == text
    else:
        said = "".join(out)
        assert text.startswith(said) and len(said) <= min(ends)
        assert not any(stop in said for stop in stops)
