"""Reports: what is written is read back; a score that is missing says why."""

import csv
from dataclasses import replace

import pytest

from swlora.evaluation.evaluated import EnglishLoss
from swlora.evaluation.report import scores_table
from swlora.evaluation.scores import Scores
from swlora.evaluation.scoring import write_predictions

SCORES = Scores(
    bleu=0.5,
    nist=7.12345,
    meteor=None,
    rouge_l=0.25,
    cider=2.0,
    meteor_reason="Java was not found",
    tokenizer="python",
)


def test_predictions_are_read_back_as_they_were(tmp_path):
    prompts = ['name[A "B"], food[x]', "two\nlines", "ü,ß;"]
    predictions = ["He said: “x”, y", "", ' "quoted" ']
    references = [["one"], ["a", "b, c", "d\ne"], ["x", "y"]]
    measured = [{"chrf": 0.1 * k, "n_tokens": 3} for k in range(3)]
    write_predictions(tmp_path / "p.csv", prompts, predictions, references, measured)
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    assert header == ["prompt", "prediction", "ref_1", "ref_2", "ref_3", "chrf", "n_tokens"]
    assert rows == [
        [prompts[0], predictions[0], "one", "", "", "0.0", "3"],
        [prompts[1], predictions[1], "a", "b, c", "d\ne", "0.1", "3"],
        [prompts[2], predictions[2], "x", "y", "", "0.2", "3"],
    ]


def test_lists_of_unequal_length_are_an_error_and_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        write_predictions(tmp_path / "p.csv", ["a", "b"], ["x"], [["r"], ["s"]], [{}, {}])
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_scores():
    """On the scales of papers, as the tables of studies are."""
    lines = scores_table(SCORES, {}, 30, nll=1.25).splitlines()
    assert lines == [
        "BLEU          50.0",
        "NIST          7.12",
        "METEOR         n/a  (Java was not found)",
        "ROUGE-L       25.0",
        "CIDEr         2.00",
        "NLL          1.250  (nats a trained token)",
        "BLEU, METEOR and ROUGE-L are of 100",
    ]
    assert "NLL" not in scores_table(SCORES, {}, 30)
    assert "PPL" not in scores_table(SCORES, {}, 30)
    english = EnglishLoss(
        perplexity_before=20.0,
        perplexity=25.4677,
        sum_nats=0.0,
        n_tokens=0,
        windows_begin_with_bos=False,
    )
    line = scores_table(SCORES, {}, 30, english=english).splitlines()[-2]
    assert line == "PPL           25.5  of English text; 20.0 before training"


def test_long_names_of_ones_own_scores_leave_the_columns_aligned() -> None:
    own = {"share_of_valid_json": 0.5, "x": 12.0}
    lines = scores_table(SCORES, {"BLEU": [0.4, 0.6]}, 30, nll=1.25, own=own).splitlines()[:-1]
    ends = {line.split("  ")[0]: len(line[:28].rstrip()) for line in lines}
    assert set(ends.values()) == {28} and len(ends) == len(lines)
    assert "share_of_valid_json      0.5" in lines


def test_of_the_official_scores_any_text_has_rouge_l() -> None:
    lines = scores_table(SCORES, {"BLEU": [0.4, 0.6]}, 30, has_official=False, nll=1.25)
    assert [line.split()[0] for line in lines.splitlines()] == ["score", "ROUGE-L", "NLL", "exact,"]


def test_intervals_stand_beside_the_scores():
    intervals = {"BLEU": [0.4012, 0.6], "NIST": [6.5, 7.25], "NLL": [1.2, 1.3004]}
    scores = replace(SCORES, meteor=0.375)
    assert scores_table(scores, intervals, 30, nll=1.25).splitlines() == [
        "score        value  95% interval",
        "BLEU          50.0  40.1 to 60.0",
        "NIST          7.12  6.50 to 7.25",
        "METEOR        37.5",
        "ROUGE-L       25.0",
        "CIDEr         2.00",
        "NLL          1.250  1.200 to 1.300   (nats a trained token)",
        "BLEU, METEOR and ROUGE-L are of 100; intervals from 1,000 draws of the 30 prompts",
    ]


def test_few_prompts_are_warned_of():
    intervals = {"BLEU": [0.4, 0.6]}
    line = scores_table(SCORES, intervals, 3).splitlines()[-1]
    assert line == (
        "only 3 prompts: the scores say little of other prompts, and intervals from so few are "
        "too narrow; evaluate on 30 or more"
    )
    line = scores_table(SCORES, {}, 1).splitlines()[-1]
    assert line == "only 1 prompt: the scores say little of other prompts; evaluate on 30 or more"
    assert "only" not in scores_table(SCORES, {}, 30)
