"""Rows of files: every row is an `Example` or a reason why it cannot be used; read one by one.

Bad rows stop the load with the file, the physical line and the reason, or are counted where the
user asked to leave them out. CSV is read strictly: nothing after a broken quotation is trusted.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from swlora.data.chat_rows import make_chat, unused_meaning
from swlora.data.examples import Example, keep, make_example
from swlora.errors import DataError, UserError

E2E_COLUMNS = ("mr", "ref")
Row = tuple[int, Example | str]  # number in the file; the example, or why it cannot be used


def read_rows(
    path: Path, columns: tuple[str, str], skip_bad_rows: bool
) -> tuple[Sequence[Example], int]:
    """Read a file; (examples, number of bad rows left out). DataError for the first bad row."""
    try:
        return collect_rows(
            READERS[path.suffix.lower()](path, columns), f"{path}, line", skip_bad_rows
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def collect_rows(
    rows: Iterable[Row], where: str, skip_bad_rows: bool
) -> tuple[Sequence[Example], int]:
    """Separate usable rows from bad ones; (examples, number of bad rows)."""
    first_problem, n_bad = "", 0

    def usable() -> Iterator[Example]:
        nonlocal first_problem, n_bad
        for number, row in rows:
            if isinstance(row, Example):
                if skip_bad_rows or not n_bad:  # else the load ends in an error, with a count
                    yield replace(row, source=where, number=number)
            else:
                n_bad += 1
                first_problem = first_problem or f"{where} {number}: {row}"

    examples = keep(usable())
    if n_bad and not skip_bad_rows:
        rest = f"and {n_bad - 1} more; --skip-bad-rows leaves them out"
        raise DataError(
            f"{first_problem}; {rest if n_bad > 1 else '--skip-bad-rows leaves it out'}"
        )
    if not examples:
        raise DataError(f"no usable row: {first_problem or where + ' 1: the file holds no rows'}")
    return examples, n_bad


def _csv_rows(path: Path, columns: tuple[str, str]) -> Iterator[Row]:
    # surrogateescape carries bytes that are not UTF-8 through to the row that they belong to.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            header = next(reader, [])
            for column in columns:
                if header.count(column) != 1:
                    found = ", ".join(map(repr, header)) or "none"
                    raise DataError(
                        f"{path} needs one column {column!r}; columns found: {found}"
                        f"{_choice(column, columns)}"
                    )
            prompt, completion = (header.index(column) for column in columns)
            line = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    yield line, f"it has {len(row)} fields, the header {len(header)}"
                elif row:
                    yield line, make_example(row[prompt], row[completion])
                line = reader.line_num + 1
        except csv.Error as error:  # nothing after a broken quotation can be trusted
            raise DataError(f"{path}, line {line}: not valid CSV: {error}") from error


def _choice(column: str, columns: tuple[str, str]) -> str:
    """Return the flag that names another column; nothing where the columns are E2E's own."""
    if columns == E2E_COLUMNS:
        return ""
    flag = "--prompt-column" if column == columns[0] else "--completion-column"
    return f" (name the right one with {flag})"


def _jsonl_rows(path: Path, columns: tuple[str, str]) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                yield line, _json_row(raw.removeprefix(codecs.BOM_UTF8), columns)


READERS: dict[str, Callable[[Path, tuple[str, str]], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json-lines": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".csv": _csv_rows,
}


def _json_row(raw: bytes, columns: tuple[str, str]) -> Example | str:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return "not valid UTF-8"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON ({error})"
    if not isinstance(row, dict):
        return "not a JSON object"
    is_chat = "messages" in row and columns[0] not in row
    if problem := unused_meaning(row, columns, is_chat=is_chat):
        return problem
    if is_chat:
        return make_chat(row["messages"], row.get("tools"))
    for column in columns:
        if column not in row:
            found = ", ".join(map(repr, row)) or "nothing"
            return f"it has no {column!r}, only {found}{_choice(column, columns)}"
    return make_example(row[columns[0]], row[columns[1]])
