"""Texts in pieces have the tokens that they have as a whole, whatever a tokenizer adds."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.chat_templates import chat_tokenizer
from tests.support.marking_tokenizers import TOKENIZERS
from tokenizers import AddedToken

from swlora.data import text_tokens
from swlora.data.text_tokens import PieceTokenizer
from swlora.data.tokenise import token_ids

# Each is found in another way: inside of one another, with the spaces around it, as a word only ...
ADDED = [
    AddedToken("<a>", special=True),
    AddedToken("x<a>y", special=True),
    AddedToken("<left>", special=True, lstrip=True),
    AddedToken("<right>", special=True, rstrip=True),
    AddedToken("<word>", special=True, single_word=True),
    AddedToken(" <space>", special=True),
    AddedToken("<late>", special=False, normalized=True),
    AddedToken("<text>", special=False, normalized=False),
]
PIECES = [*(token.content for token in ADDED), "x", "y", " ", "\n", "good", "\nday", "<", "a>", "."]
TEXTS = st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), max_size=5)


def with_added(tokenizer: Any) -> Any:
    found = copy.deepcopy(tokenizer)
    found.add_tokens(ADDED)
    return found


ALL = {name: with_added(tokenizer) for name, tokenizer in TOKENIZERS.items()}
ALL["bytes"] = with_added(chat_tokenizer("{{ messages }}"))
ALL["as text"] = with_added(chat_tokenizer("{{ messages }}"))
ALL["as text"].split_special_tokens = True


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from(sorted(ALL)), calls=st.lists(TEXTS, min_size=1, max_size=2))
def test_pieces_have_the_tokens_of_the_whole(name: str, calls: list[list[str]]) -> None:
    tokenizer = ALL[name]
    pieces = PieceTokenizer(tokenizer, tokenizer.all_special_ids[:1])
    for texts in calls:
        whole = token_ids(texts, tokenizer, special=False)
        assert [tokens.ids for tokens in pieces.tokenised(texts)] == whole


def test_a_place_is_where_the_tokens_before_are_those_of_the_text_before() -> None:
    def ids_of(text: str) -> list[int]:
        return token_ids([text], tokenizer, special=False)[0]

    tokenizer = ALL["metaspace always"]
    for text in ("good day<a>bonjour a day", "<a>x<a>y good", ""):
        (tokens,) = PieceTokenizer(tokenizer, ()).tokenised([text])
        for at in range(len(text) + 1):
            n = len(ids_of(text[:at]))
            expected = n if tokens.ids[:n] == ids_of(text[:at]) else None
            assert tokens.place(at, ids_of) == expected, (text, at)


def test_what_texts_share_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(texts: list[str], tokenizer: Any) -> list[list[int]]:
        asked.extend(texts)
        return token_ids(texts, tokenizer, special=False)

    monkeypatch.setattr(text_tokens, "piece_ids", counted)
    pieces = PieceTokenizer(ALL["bytes"], ())
    pieces.tokenised(["<a>one<text>1", "<a>one<text>2"])
    assert asked == ["<a>one", "<text>1", "<text>2"]
    pieces.tokenised(["<a>one<text>2"])
    assert asked[3:] == ["<text>2"]
