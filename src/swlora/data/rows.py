"""Rows of files: every row is an `Example` or a reason why it cannot be used; read one by one.

Bad rows stop the load with the file, the line and the reason, or are counted by reason where the
user asked to leave them out. Where all rows of a file have the same columns and these are of no
known form, the file is refused, whatever was asked.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from swlora.data.dataset import Counts, Dataset
from swlora.data.examples import Example, keep, length_problem
from swlora.data.forms import Recogniser
from swlora.data.json_records import Record
from swlora.data.problems import count_problem
from swlora.data.records import has_columns, read_records, unit
from swlora.errors import DataError

E2E_COLUMNS = {"prompt": "mr", "completion": "ref"}
Row = tuple[str, int, Example | str]  # its file and unit, its number there; the example, or why not


@dataclass(frozen=True)
class Rows:
    """The usable rows, and how many others were left out, by reason."""

    examples: Sequence[Example]
    bad: Mapping[str, int]


def read_rows(paths: Sequence[Path], columns: Mapping[str, str], skip_bad_rows: bool) -> Rows:
    """Read files one after the other, as one; DataError for the first bad row.

    `columns` names the columns of fields that have other names there (see `forms`).
    """
    return read_files(paths, Recogniser(columns), skip_bad_rows)


def read_files(paths: Sequence[Path], recogniser: Recogniser, skip_bad_rows: bool) -> Rows:
    """Read files one after the other, as one; DataError for the first bad row."""
    rows = (row for path in paths for row in rows_of(path, recogniser))
    return collect_rows(rows, f"{paths[0]}, {unit(paths[0])} 1", skip_bad_rows)


def rows_of(path: Path, recogniser: Recogniser) -> Iterator[Row]:
    """Yield the rows of a file."""
    records, where = read_records(path), f"{path}, {unit(path)}"
    return recognise(records, recogniser, where, table=str(path) if has_columns(path) else None)


def recognise(
    records: Iterable[Record], recogniser: Recogniser, where: str, *, table: str | None
) -> Iterator[Row]:
    """Yield the rows that records are; `where` says of what their numbers are.

    `table` names a source whose records all have the same columns: DataError, whatever was asked,
    where these are of no known form.
    """
    for number, record in records:
        if isinstance(record, str):
            yield where, number, record
            continue
        if table is not None and recogniser.form(record) is None:
            raise DataError(f"{table}: {recogniser.unknown(record)}")
        table = None
        yield where, number, recogniser.example(record)


def collect_rows(
    rows: Iterable[Row], first: str, skip_bad_rows: bool, limit: int | None = None
) -> Rows:
    """Separate usable rows from bad ones, up to `limit` usable ones.

    `first` is the place that an empty file is named by.
    """
    first_problem, bad = "", Counter[str]()

    def usable() -> Iterator[Example]:
        nonlocal first_problem
        for where, number, found in rows:
            row = (isinstance(found, Example) and length_problem(found)) or found
            if isinstance(row, Example):
                if skip_bad_rows or not bad:  # else the load ends in an error, with a count
                    yield replace(row, source=where, number=number)
            else:
                count_problem(bad, row)
                first_problem = first_problem or f"{where} {number}: {row}"
                if limit is not None and not skip_bad_rows:
                    return  # a stream may have no end

    examples, n_bad = keep(islice(usable(), limit)), bad.total()
    if n_bad and not skip_bad_rows:
        rest = f"and {n_bad - 1} more; --skip-bad-rows leaves them out"
        raise DataError(
            f"{first_problem}; {rest if n_bad > 1 else '--skip-bad-rows leaves it out'}"
        )
    if not examples:
        raise DataError(f"no usable row: {first_problem or first + ': the file holds no rows'}")
    return Rows(examples, dict(bad.most_common()))


def dataset_of(name: str, source: str, parts: Sequence[Rows], separator: str = "") -> Dataset:
    """Return train, dev and test as a data set."""
    train, dev, test = (rows.examples for rows in parts)
    bad = sum((Counter(rows.bad) for rows in parts), Counter[str]())
    return Dataset(name, source, separator, train, dev, test, Counts(dict(bad.most_common())))
