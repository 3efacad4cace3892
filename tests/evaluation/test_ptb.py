"""The Python tokeniser is held against the Java program on all E2E references."""

import csv
import random
from pathlib import Path

import pytest

from swlora.evaluation.meteor import java_ptb_tokenize, missing_java
from swlora.evaluation.ptb import ptb_tokenize

needs_java = pytest.mark.skipif(missing_java() is not None, reason=str(missing_java()))


@pytest.fixture(scope="module")
def all_references(shared_dir: Path) -> list[str]:
    texts = []
    for name in ("trainset", "devset", "testset_w_refs"):
        path = shared_dir / "e2e-dataset" / f"{name}.csv"
        with path.open(encoding="utf-8", newline="") as file:
            texts += [row["ref"] for row in csv.DictReader(file)]
    return texts


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Prices start at £30.", "prices start at # 30"),
        ("Between £20-£25, or €5.", "between # 20 # 25 or $ 5"),
        ("20£-25", "20 # -25"),
        ("It isn't family-friendly; they can't.", "it is n't family-friendly they ca n't"),
        ("You cannot miss Zizzi's", "you can not miss zizzi 's"),
        ("'The Mill' (a pub)", "the mill -lrb- a pub -rrb-"),
        ("near St. John's College.", "near st. john 's college"),
        ("in the city center., near", "in the city center. near"),
        ("French,family-friendly", "french,family-friendly"),
        ("French,friendly", "french friendly"),
        ("3/5 rating... adult - only--no", "3/5 rating adult only no"),
        ("Café Rouge.6", "café rouge .6"),
        ("at No. 5, or no. five", "at no. 5 or no five"),
        ("wow!! yes!", "wow !! yes"),
        ("hors d'oeuvres", "hors d'oeuvres"),
        (" \u00a0\r\n", ""),
        ("...", ""),
    ],
)
def test_literal_cases(text: str, tokens: str) -> None:
    assert ptb_tokenize([text]) == [tokens.split()]


def test_the_next_word_decides_on_the_stop_of_a_single_letter() -> None:
    assert ptb_tokenize(["20-25 L. The pub"]) == [["20-25", "l", "the", "pub"]]
    assert ptb_tokenize(["20-25 L. Pub"]) == [["20-25", "l.", "pub"]]
    assert ptb_tokenize(["20-25 L.", "", "The pub"]) == [["20-25", "l"], [], ["the", "pub"]]


def test_no_texts_give_no_tokens() -> None:
    assert ptb_tokenize([]) == []


@needs_java
def test_equal_to_java_on_every_reference(all_references: list[str]) -> None:
    assert len(all_references) > 50_000
    ours, theirs = ptb_tokenize(all_references), java_ptb_tokenize(all_references)
    assert [
        (text, a, b) for text, a, b in zip(all_references, ours, theirs, strict=True) if a != b
    ] == []


@needs_java
def test_equal_to_java_on_text_that_is_in_no_reference(all_references: list[str]) -> None:
    rng = random.Random(11)
    words = [word for text in all_references for word in text.split()]
    texts = [" ".join(rng.choices(words, k=rng.randrange(30))) for _ in range(10_007)]
    sample = rng.sample(all_references, 5_003)
    texts += [text.lower() for text in sample] + [text.upper() for text in sample]
    texts += [text.replace("-", " - ").replace("'", " ' ") for text in sample]
    ours, theirs = ptb_tokenize(texts), java_ptb_tokenize(texts)
    assert [(t, a, b) for t, a, b in zip(texts, ours, theirs, strict=True) if a != b] == []
