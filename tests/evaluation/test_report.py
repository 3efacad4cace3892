"""Reports: what is written is read back; a score that is missing says why."""

import csv

import pytest

from swlora.evaluation.report import scores_table, write_predictions

SCORES = {"BLEU": 0.5, "NIST": 7.12345, "METEOR": None, "ROUGE_L": 0.25, "CIDEr": 2.0}


def test_predictions_are_read_back_as_they_were(tmp_path):
    prompts = ['name[A "B"], food[x]', "two\nlines", "ü,ß;"]
    predictions = ["He said: “x”, y", "", ' "quoted" ']
    references = [["one"], ["a", "b, c", "d\ne"], ["x", "y"]]
    write_predictions(tmp_path / "p.csv", prompts, predictions, references)
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    assert header == ["mr", "prediction", "ref_1", "ref_2", "ref_3"]
    assert rows == [
        [prompts[0], predictions[0], "one", "", ""],
        [prompts[1], predictions[1], "a", "b, c", "d\ne"],
        [prompts[2], predictions[2], "x", "y", ""],
    ]


def test_lists_of_unequal_length_are_an_error_and_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        write_predictions(tmp_path / "p.csv", ["a", "b"], ["x"], [["r"], ["s"]])
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_scores():
    lines = scores_table(SCORES | {"meteor_reason": "Java was not found", "nll": 1.25}).splitlines()
    assert [line.split() for line in lines] == [
        ["BLEU", "0.5000"],
        ["NIST", "7.1235"],
        ["METEOR", "n/a", "(Java", "was", "not", "found)"],
        ["ROUGE_L", "0.2500"],
        ["CIDEr", "2.0000"],
        ["NLL", "1.2500", "nats", "a", "completion", "token"],
    ]
    assert "NLL" not in scores_table(SCORES)
    assert "PPL" not in scores_table(SCORES)
    english = {"english_perplexity": 25.4677, "english_perplexity_before": 20.0}
    line = scores_table(SCORES | english).splitlines()[-1]
    assert line == "PPL         25.47  of English text; 20.00 before training"
    assert "METEOR     0.3000" in scores_table(SCORES | {"METEOR": 0.3})
