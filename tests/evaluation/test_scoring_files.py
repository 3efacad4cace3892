"""Files of outputs and references: how they are read, and which mistakes are named."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest

from swlora.errors import DataError, UserError
from swlora.evaluation import scoring_files
from swlora.evaluation.scoring_files import read_references, score_files
from swlora.evaluation.text_scores import TextScores
from swlora.result_json import as_json

REFERENCES = "a one\na two\n\nb one\n\n\nc one\nc two\nc three\n"
GROUPS = [["a one", "a two"], ["b one"], ["c one", "c two", "c three"]]
E2E = "mr,ref\nname[A],a one\nname[B],b one\nname[A],a two\n"


@pytest.fixture
def scored(monkeypatch) -> list[tuple[list[str], list[list[str]]]]:
    """Record what is handed to the metrics, which have their own tests."""
    calls: list[tuple[list[str], list[list[str]]]] = []

    @dataclass(frozen=True)
    class Bleu:
        BLEU: float = 0.5

    class Statistics:
        def scores(self) -> Bleu:
            return Bleu()

        def resampled(self, weights) -> dict[str, np.ndarray]:
            return {"BLEU": weights[:, 0] / weights.sum(axis=1)}

    def segment_statistics(outputs, groups) -> Statistics:
        calls.append((outputs, groups))
        return Statistics()

    monkeypatch.setattr(scoring_files, "segment_statistics", segment_statistics)
    return calls


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_references_in_groups(newline, bom, tmp_path):
    text = bom + REFERENCES.replace("\n", newline)
    assert read_references(write(tmp_path / "refs.txt", text)) == GROUPS
    assert read_references(write(tmp_path / "refs.txt", text.rstrip())) == GROUPS
    assert (
        read_references(write(tmp_path / "refs.txt", bom + newline + text.removeprefix(bom)))
        == GROUPS
    )


def test_references_as_e2e_csv(tmp_path):
    path = write(tmp_path / "refs.csv", E2E)
    assert read_references(path) == [["a one", "a two"], ["b one"]]


@pytest.mark.parametrize(
    ("text", "outputs"),
    [
        ("A\nB\nC\n", ["A", "B", "C"]),
        ("A\r\nB\r\nC", ["A", "B", "C"]),
        ("\ufeffA\nB\nC\n\n\n", ["A", "B", "C"]),
        ("A\n\nC\n", ["A", "", "C"]),  # a model may say nothing
        ("A\nB\n\n", ["A", "B", ""]),
        ("A\u2028x\nB\x0bx\nC\n", ["A\u2028x", "B\x0bx", "C"]),  # only a newline ends a line
    ],
)
def test_one_output_a_line(text, outputs, scored, tmp_path):
    predictions, references = write(tmp_path / "p", text), write(tmp_path / "r", REFERENCES)
    result = as_json(score_files(predictions, references))
    for name in [field.name for field in fields(TextScores)]:
        result.pop(name)
    assert scored == [(outputs, GROUPS)]
    assert result == {
        "BLEU": 0.5,
        "scale": "as the official script prints them: BLEU, METEOR and ROUGE_L from 0 to 1",
        "intervals": {"BLEU": [0, 1]},
        "bootstrap": {"draws": 1000, "seed": 0, "confidence": 0.95},
        "n_prompts": 3,
        "predictions": str(predictions),
        "references": str(references),
    }


@pytest.mark.parametrize(("text", "n"), [("A\nB\n", 2), ("A\nB\nC\nD\n", 4), ("\n", 1)])
def test_another_number_of_outputs_is_refused(text, n, scored, tmp_path):
    with pytest.raises(UserError, match=rf"has {n} outputs? but .* has 3 distinct MRs"):
        score_files(write(tmp_path / "p", text), write(tmp_path / "r", REFERENCES))
    assert scored == []


def test_files_that_cannot_be_read(scored, tmp_path):
    good, gone = write(tmp_path / "r", REFERENCES), tmp_path / "gone"
    latin = write(tmp_path / "latin", b"\xe9\n")
    for predictions, references in ((gone, good), (good, gone), (tmp_path, good), (latin, good)):
        with pytest.raises(UserError, match="cannot read") as refused:
            score_files(predictions, references)
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(DataError, match="holds no references"):
        score_files(good, write(tmp_path / "empty", "\n \n"))
    with pytest.raises(DataError, match="it has no column 'mr'; columns found: 'a', 'b'"):
        score_files(good, write(tmp_path / "other.csv", "a,b\n1,2\n"))
