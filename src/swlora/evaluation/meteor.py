"""The two Java programs of the official scores: METEOR 1.5 and the CoreNLP tokeniser.

Both jars come with the PyPI package pycocoevalcap; a Java runtime has to be on PATH. METEOR
aligns a hypothesis with each reference and returns statistics of the best one. They add up over
segments, and the score is a function of their sum (Denkowski and Lavie 2014, English weights):
    P = sum_i w_i (d m_i,content + (1-d) m_i,function) / (d |content| + (1-d) |function|), R alike
    score = P R / (a P + (1-a) R) * (1 - g (chunks / mean matched words)^b)
with matchers i = exact, stem, synonym, paraphrase.
"""

import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swlora.errors import RunFailedError
from swlora.evaluation.ptb import PUNCTUATION

METEOR_COLUMNS = 23
"""Lengths (4), matches of four matchers (4 each: content of hypothesis and reference, function
words of hypothesis and reference), chunks, matched words of hypothesis and of reference."""

_MATCHER_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_METEOR_JAR = Path("meteor", "meteor-1.5.jar")
_TOKENIZER_JAR = Path("tokenizer", "stanford-corenlp-3.4.1.jar")
_TIMEOUT_S = 1800.0


def _jar(name: Path) -> Path | None:
    spec = find_spec("pycocoevalcap")
    folders = spec.submodule_search_locations if spec else None
    return next((Path(f) / name for f in folders or () if (Path(f) / name).is_file()), None)


def missing_java() -> str | None:
    """What keeps the Java programs from running, in one line; None where all is there."""
    if shutil.which("java") is None:
        return "no `java` on PATH; install a Java runtime to get METEOR"
    for name in (_METEOR_JAR, _TOKENIZER_JAR):
        if _jar(name) is None:
            return f"{name.name} not found; install the package pycocoevalcap to get METEOR"
    return None


def _run_java(arguments: Sequence[str], lines: Sequence[str], what: str) -> list[str]:
    """Feed lines to a Java program and return exactly as many lines of its output.

    RunFailedError if it cannot start, dies, exceeds the time limit or drops a line.
    """
    command = [shutil.which("java") or "java", "-Dfile.encoding=UTF-8", *arguments]
    text = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunFailedError(f"{what} failed: {error}; score with java=False instead") from error
    output = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode != 0 or len(output) != len(lines):
        said = done.stderr.decode("utf-8", "replace").strip().split("\n")[-1]
        raise RunFailedError(
            f"{what} failed: exit code {done.returncode}, {len(output)} lines for {len(lines)}"
            f" ({said or 'no message'}); score with java=False instead"
        )
    return output


def java_ptb_tokenize(texts: Sequence[str]) -> list[list[str]]:
    """What swlora.evaluation.ptb.ptb_tokenize computes, by the CoreNLP program itself."""
    arguments = ["-cp", str(_jar(_TOKENIZER_JAR)), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = [" ".join(text.split()) for text in texts]  # one line each
    tokenized = _run_java([*arguments, "-preserveLines", "-lowerCase"], lines, "the tokeniser")
    return [[token for token in line.split() if token not in PUNCTUATION] for line in tokenized]


def meteor_statistics(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> NDArray[np.float64]:
    """METEOR statistics [segments, METEOR_COLUMNS] of Penn-Treebank tokens (needs Java)."""
    lines = [
        " ||| ".join(["SCORE", *map(" ".join, group), " ".join(hypothesis)])
        for hypothesis, group in zip(hypotheses, references, strict=True)
    ]
    arguments = ["-Xmx2G", "-jar", str(_jar(_METEOR_JAR)), "-", "-", "-stdio", "-l", "en", "-norm"]
    output = _run_java(arguments, lines, "METEOR")
    try:
        rows = np.array([line.split() for line in output], dtype=np.float64)
    except ValueError as error:
        raise RunFailedError(f"METEOR failed: it answered {output[0][:80]!r}") from error
    if rows.shape != (len(lines), METEOR_COLUMNS):
        raise RunFailedError(f"METEOR failed: statistics of shape {rows.shape}")
    # METEOR counts no chunk for a segment matched completely in one piece: no fragmentation.
    complete = (rows[:, 20] == 1) & (rows[:, 21:] == rows[:, :2]).all(axis=1)
    rows[complete, 20] = 0
    return rows


def meteor_score(total: NDArray[np.float64]) -> float:
    """Corpus METEOR in [0, 1] of summed statistics; 0 where nothing matches."""
    lengths, (chunks, *matched) = total[:4], total[20:]
    matches = total[4:20].reshape(4, 4)  # matcher x (content h, content r, function h, function r)
    content, function = _MATCHER_WEIGHTS @ matches[:, :2], _MATCHER_WEIGHTS @ matches[:, 2:]
    weighted_length = _DELTA * (lengths[:2] - lengths[2:]) + (1 - _DELTA) * lengths[2:]
    hits = _DELTA * content + (1 - _DELTA) * function
    if hits.min() <= 0:
        return 0.0
    precision, recall = hits / weighted_length
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    return float(mean * (1 - _GAMMA * (chunks / np.mean(matched)) ** _BETA))
