"""The five scores against the official ones, and against plain references."""

import csv
import json
import math
import random
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu

from swlora.errors import RunFailedError, UserError
from swlora.evaluation import meteor as meteor_module
from swlora.evaluation.meteor import meteor_score, meteor_statistics, missing_java
from swlora.evaluation.ngram_scores import mteval_tokens
from swlora.evaluation.ptb import ptb_tokenize
from swlora.evaluation.scores import Scores, segment_statistics
from swlora.result_json import as_json

needs_java = pytest.mark.skipif(missing_java() is not None, reason=str(missing_java()))
NAMES = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
TEXT = "the The pub, café is not £20-25 3.5 near it's family-friendly 1,000 a . -"

Corpus = tuple[list[str], list[list[str]]]


def random_corpus(segments: int, seed: int) -> Corpus:
    """Predictions near their references, 1 to 5 references each, a few predictions empty."""
    rng = random.Random(seed)
    predictions, references = [], []
    for i in range(segments):
        base = ["pub", *rng.choices(TEXT.split(), k=rng.randrange(6, 17))]
        group = [
            " ".join(w for w in base if w == "pub" or rng.random() < 0.85)
            for _ in range(rng.randrange(1, 6))
        ]
        predictions.append("" if i % 11 == 7 else " ".join(w for w in base if rng.random() < 0.9))
        references.append(group)
    return predictions, references


@pytest.fixture(params=["dev10_baseline", "test630_tgen"])
def official(request: pytest.FixtureRequest, shared_dir: Path) -> tuple[Corpus, dict[str, Any]]:
    folder = shared_dir / "e2e-metrics"
    golden = json.loads((folder / "official_scores.json").read_text())[request.param]
    predictions = (folder / golden["outputs"]).read_text(encoding="utf-8").strip().split("\n")
    if request.param == "dev10_baseline":
        text = (folder / "devel-conc.txt").read_text(encoding="utf-8")
        return (predictions, [group.split("\n") for group in text.strip().split("\n\n")]), golden
    groups: dict[str, list[str]] = {}
    path = shared_dir / "e2e-dataset" / "testset_w_refs.csv"
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(row["mr"], []).append(row["ref"])
    return (predictions, list(groups.values())), golden


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, java: bool | None = None
) -> Scores:
    return segment_statistics(predictions, references, java=java).scores()


def rounded(scores: dict[str, Any]) -> dict[str, str]:
    return {name: f"{scores[name]:.4f}" for name in NAMES if scores[name] is not None}


@pytest.mark.slow
@needs_java
def test_official_scores_with_java(official: tuple[Corpus, dict[str, Any]]) -> None:
    corpus, golden = official
    scores = as_json(score(*corpus))
    assert rounded(scores) == rounded(golden)
    assert (scores["tokenizer"], scores["meteor_reason"]) == ("java", None)


def test_official_scores_without_java(official: tuple[Corpus, dict[str, Any]]) -> None:
    corpus, golden = official
    scores = as_json(score(*corpus, java=False))
    assert rounded(scores) == rounded({**golden, "METEOR": None})
    assert (scores["tokenizer"], scores["METEOR"]) == ("python", None)
    assert scores["meteor_reason"] == "Java was switched off"


@pytest.mark.parametrize("seed", range(5))
def test_bleu_equals_sacrebleu(seed: int) -> None:
    predictions, references = random_corpus(37, seed)
    width = max(map(len, references))
    streams = [[(group + [None] * width)[i] for group in references] for i in range(width)]
    theirs = sacrebleu.corpus_bleu(
        predictions, streams, lowercase=True, tokenize="13a", smooth_method="none"
    )
    ours = segment_statistics(predictions, references, java=False)
    assert ours.corpus()["BLEU"] == pytest.approx(theirs.score / 100, abs=1e-12)
    assert ours.bleu[:, :4].sum(axis=0).tolist() == theirs.counts
    assert ours.bleu[:, 4:8].sum(axis=0).tolist() == theirs.totals
    assert ours.bleu[:, 8:].sum(axis=0).tolist() == [theirs.sys_len, theirs.ref_len]
    assert 0.1 < theirs.score / 100 < 0.99


def test_closest_reference_length_is_the_shorter_on_a_tie() -> None:
    rows = segment_statistics(["a b c d"], [["a b c d e f", "a b"]], java=False).bleu
    assert rows[0, 8:].tolist() == [4, 2]


def plain_nist(predictions: list[str], references: list[list[str]]) -> float:
    hypotheses = [mteval_tokens(text) for text in predictions]
    groups = [[mteval_tokens(text) for text in group] for group in references]

    def grams(tokens: list[str], n: int) -> list[str]:
        return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    every = [reference for group in groups for reference in group]
    result = 0.0
    for n in range(1, 6):
        count = Counter(gram for reference in every for gram in grams(reference, n))
        shorter = Counter(gram for reference in every for gram in grams(reference, n - 1))
        words = sum(map(len, every))
        gain, total = 0.0, 0
        for hypothesis, group in zip(hypotheses, groups, strict=True):
            total += len(grams(hypothesis, n))
            for gram in set(grams(hypothesis, n)):
                best = max(grams(reference, n).count(gram) for reference in group)
                hits = min(best, grams(hypothesis, n).count(gram))
                before = shorter[gram.rpartition(" ")[0]] if n > 1 else words
                gain += hits * math.log2(before / count[gram]) if hits else 0.0
        result += gain / total
    ratio = sum(map(len, hypotheses)) / sum(sum(map(len, g)) / len(g) for g in groups)
    beta = math.log(0.5) / math.log(1.5) ** 2
    return result * math.exp(beta * math.log(min(1.0, ratio)) ** 2)


@pytest.mark.parametrize("seed", range(3))
def test_nist_equals_a_plain_reference(seed: int) -> None:
    corpus = random_corpus(29, seed)
    assert score(*corpus, java=False).nist == pytest.approx(plain_nist(*corpus), rel=1e-12)


def test_nist_is_halved_at_two_thirds_of_the_length() -> None:
    short = score(["a b"], [["a b c"]], java=False).nist
    assert short == pytest.approx(0.5 * math.log2(3), rel=1e-12)


@pytest.mark.slow
@needs_java
def test_meteor_from_summed_statistics_equals_the_jar() -> None:
    predictions, references = random_corpus(41, 5)
    predictions[:6] = [group[0] for group in references[:6]]  # complete matches in one piece
    hypotheses, groups = ptb_tokenize(predictions), [ptb_tokenize(g) for g in references]
    lines = [
        " ||| ".join(["SCORE", *map(" ".join, group), " ".join(tokens)])
        for tokens, group in zip(hypotheses, groups, strict=True)
    ]

    def jar(lines: list[str]) -> list[str]:
        path = str(meteor_module._jar(meteor_module._METEOR_JAR))
        command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", path, "-", "-", "-stdio"]
        text = "\n".join([*lines, ""]).encode()
        done = subprocess.run([*command, "-l", "en", "-norm"], input=text, capture_output=True)
        return done.stdout.decode().split("\n")[:-1]

    raw = jar(lines)
    draws = [np.random.default_rng(i).integers(0, 41, 17) for i in range(9)]
    answers = iter(map(float, jar([" ||| ".join(["EVAL", *(raw[i] for i in d)]) for d in draws])))
    rows = meteor_statistics(hypotheses, groups)
    assert (rows[:6, 20] == 0).all()
    for draw in draws:
        for i in draw:
            assert meteor_score(rows[i]) == pytest.approx(next(answers), abs=1e-12)
        assert meteor_score(rows[draw].sum(axis=0)) == pytest.approx(next(answers), abs=1e-12)


def test_a_resample_scores_like_the_resampled_segments() -> None:
    predictions, references = random_corpus(31, 3)
    statistics = segment_statistics(predictions, references, java=False)
    draw = np.random.default_rng(0).integers(0, 31, 31)
    resampled = statistics.corpus(draw)
    again = score([predictions[i] for i in draw], [references[i] for i in draw], java=False)
    assert resampled["BLEU"] == pytest.approx(again.bleu, rel=1e-12)
    assert resampled["ROUGE_L"] == pytest.approx(again.rouge_l, rel=1e-12)
    assert resampled["BLEU"] != pytest.approx(statistics.corpus()["BLEU"], rel=1e-6)
    # Weights of the whole set: CIDEr is the mean of the rows of the whole set.
    assert resampled["CIDEr"] == pytest.approx(statistics.cider[draw].mean(), rel=1e-12)
    assert resampled["CIDEr"] != pytest.approx(again.cider, rel=1e-6)
    assert statistics.corpus(np.arange(31)) == statistics.corpus()
    with pytest.raises(UserError, match="no segments"):
        statistics.corpus(np.array([], dtype=np.int64))


@pytest.mark.parametrize("java", [False, pytest.param(True, marks=[needs_java, pytest.mark.slow])])
def test_empty_predictions_count_as_segments_without_hits(java: bool) -> None:
    groups = [["the pub is cheap", "a cheap pub"], ["it is near the river bank"]]
    half = segment_statistics(["the pub is cheap", ""], groups, java=java)
    assert half.bleu[1].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 6]
    assert half.rouge_l.tolist() == [1.0, 0.0]
    assert half.cider[0] > 0 == half.cider[1]
    nothing = as_json(score(["", " \n"], groups, java=java))
    assert [nothing[name] for name in NAMES if name != "METEOR"] == [0, 0, 0, 0]
    assert nothing["METEOR"] == (0 if java else None)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no predictions"),
        (["a"], [["a"], ["b"]], "1 prediction for 2 reference groups"),
        (["a", "b"], [["a"], []], "reference group 1 has to be a list"),
        (["a"], ["a text"], "reference group 0 has to be a list"),
        (["a", "b"], [["a"], ["b", " ..."]], "reference group 1 has a reference without any word"),
    ],
)
def test_unusable_input_is_one_clear_line(
    predictions: list[str], references: list[Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        score(predictions, references, java=False)
    assert "\n" not in str(caught.value)


def test_without_java_meteor_has_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = score(["a pub", "b"], [["a pub"], ["b c"]])
    assert (scores.meteor, scores.tokenizer) == (None, "python")
    assert scores.meteor_reason == "no `java` on PATH; install a Java runtime to get METEOR"
    with pytest.raises(UserError, match="Java was asked for: no `java` on PATH"):
        score(["a"], [["a"]], java=True)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'out of memory' >&2; exit 3", r"exit code 3, 0 lines for 2 \(out of memory\)"),
        ("exit 0", r"exit code 0, 0 lines for 2 \(no message\)"),
        ("exec /bin/sleep 30", "timed out"),
    ],
)
def test_a_java_that_dies_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str
) -> None:
    fake = tmp_path / "java"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(meteor_module, "_TIMEOUT_S", 0.5)
    with pytest.raises(RunFailedError, match=message):
        score(["a", "b"], [["a"], ["b"]])
