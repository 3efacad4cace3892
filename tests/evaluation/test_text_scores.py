"""Scores of any text against sacrebleu's own and numbers worked out by hand."""

import numpy as np
import pytest
import sacrebleu

from swlora.evaluation.text_scores import exact_match, text_rows, text_scores, token_f1

PREDICTIONS = ["the cat sat on the mat today", "forty two", "", "A different text entirely here"]
REFERENCES = [
    ["the cat sat on a mat", "a cat sat on the mat today"],
    ["forty  two"],
    ["something"],
    ["A different text", "Entirely different", "Another text here"],
]


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("a b", "a b", 1),
        (" a\n b ", "a b", 1),
        ("A b", "a b", 0),
        ("a b.", "a b", 0),
        ("", "", 1),
        ("", "a", 0),
    ],
)
def test_exact_match(text: str, reference: str, expected: float) -> None:
    assert exact_match(text, reference) == expected


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("The Cat.", "a cat", 1.0),
        ("red red blue", "red blue blue", 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("one two three", "three four", 2 * (1 / 3) * (1 / 2) / (5 / 6)),
        ("one", "two", 0.0),
        ("", "two", 0.0),
        ("the", "", 1.0),  # neither has a word
        ("theatre", "the atre", 0.0),
    ],
)
def test_token_f1(text: str, reference: str, expected: float) -> None:
    assert token_f1(text, reference) == pytest.approx(expected)


def test_of_several_references_the_best_counts() -> None:
    rows = text_rows(PREDICTIONS, REFERENCES)
    assert rows.exact_match.tolist() == [0, 1, 0, 0]
    assert rows.token_f1[0] == pytest.approx(max(2 * 4 / (5 + 4), 2 * 5 / (5 + 5)))
    assert rows.token_f1[1:3].tolist() == [1, 0]
    for k, (text, refs) in enumerate(zip(PREDICTIONS, REFERENCES, strict=True)):
        assert rows.chrf[k] == pytest.approx(sacrebleu.sentence_chrf(text, refs).score)


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    found = text_scores(text_rows(PREDICTIONS, REFERENCES), PREDICTIONS, REFERENCES)
    streams = [[refs[k] if k < len(refs) else None for refs in REFERENCES] for k in range(3)]
    assert found.sacrebleu == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, streams).score)
    assert found.chrf == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, streams).score)
    assert 0 < found.sacrebleu < 100 and 0 < found.chrf < 100
    assert "nrefs:var" in found.sacrebleu_signature and "tok:13a" in found.sacrebleu_signature
    assert found.chrf_signature.startswith("nrefs:var|") and "nc:6" in found.chrf_signature
    one = text_scores(text_rows(["a b"], [["a b"]]), ["a b"], [["a b"]])
    assert "nrefs:1|" in one.sacrebleu_signature
    assert (one.exact_match, one.token_f1, one.text_intervals) == (1, 1, {})


def test_intervals_are_of_prompts_drawn_again() -> None:
    predictions, references = ["a"] * 40, [["a"]] * 30 + [["b"]] * 10
    found = text_scores(text_rows(predictions, references), predictions, references)
    low, high = found.text_intervals["exact_match"]
    spread = 1.96 * np.sqrt(0.75 * 0.25 / 40)
    assert found.exact_match == 0.75
    assert low == pytest.approx(0.75 - spread, abs=0.04)
    assert high == pytest.approx(0.75 + spread, abs=0.04)
