"""Scores of outputs that already exist, from the official script's file formats."""

from pathlib import Path

from swlora.data.dataset import group_references
from swlora.data.rows import E2E_COLUMNS, read_rows
from swlora.errors import DataError, UserError
from swlora.evaluation.bootstrap import score_intervals
from swlora.evaluation.evaluated import Scored
from swlora.evaluation.scores import segment_statistics
from swlora.evaluation.text_scores import text_rows, text_scores
from swlora.files import read_text
from swlora.plural import counted


def score_files(predictions: Path, references: Path) -> Scored:
    """Score one output a line against references (E2E CSV, or blank-line-separated groups).

    Raises UserError where a file is unreadable or the numbers of outputs and groups differ.
    """
    outputs = _lines(predictions)
    groups = read_references(references)
    while len(outputs) > len(groups) and not outputs[-1].strip():
        outputs.pop()  # blank lines after the last output
    if len(outputs) != len(groups):
        raise UserError(
            f"{predictions} has {counted(len(outputs), 'output')} but {references} has "
            f"{counted(len(groups), 'distinct MR')}; give one output a line, in the file order of "
            "the MRs"
        )
    statistics = segment_statistics(outputs, groups)
    return Scored(
        scores=statistics.scores(),
        text_scores=text_scores(text_rows(outputs, groups), outputs, groups),
        intervals=score_intervals(statistics.resampled, len(groups)),
        n_prompts=len(groups),
        predictions=predictions,
        references=references,
    )


def read_references(path: Path) -> list[list[str]]:
    """Return the groups of references of an E2E CSV or of a blank-line-separated file."""
    if path.suffix.lower() == ".csv":
        examples = read_rows([path], E2E_COLUMNS, skip_bad_rows=False).examples
        return [refs for _, refs in group_references(examples)]
    groups: list[list[str]] = [[]]
    for line in _lines(path):
        if line.strip():
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    groups = [group for group in groups if group]
    if not groups:
        raise DataError(f"{path} holds no references")
    return groups


def _lines(path: Path) -> list[str]:
    return read_text(path).removeprefix("\ufeff").removesuffix("\n").split("\n")
