"""Records of files: what stands in them, by column, before anybody asks what it means.

JSON Lines, JSON (a list), CSV, TSV, Parquet, Arrow and plain text, each also with gzip around it,
read one record at a time. A record that cannot be read is its reason instead. Nothing is
converted: a date in a Parquet column stays one, so that it is not taken for text.
"""

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from swlora.data.column_records import arrow_records, parquet_records
from swlora.data.json_records import (
    Record,
    is_json_lines,
    json_lines,
    json_values,
    too_long,
)
from swlora.errors import DataError, UserError
from swlora.plural import counted

MAX_RECORD_BYTES = 16 << 20  # of a record in its file, whatever its columns are
MAX_DOCUMENT_BYTES = 64 << 20  # of a file that is one text

Reader = Callable[[Path], Iterator[Record]]


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file, numbered by line or by row from 1.

    Raises UserError for a file that cannot be opened, DataError for one that is damaged as a whole.
    """
    try:
        yield from READERS[ending(path)](path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def ending(path: Path) -> str:
    """Return what a file's name says of its format, without .gz; "" for nothing that is read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    found = suffixes[-1] if suffixes else ""
    return found if found in READERS else ""


def unit(path: Path) -> str:
    """Return what the records of a file are numbered by."""
    return "line" if ending(path) in _BY_LINE else "row"


def has_columns(path: Path) -> bool:
    """Say whether all records of a file have the same columns, by its format."""
    return ending(path) in _WITH_COLUMNS


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            with gzip.open(file) as inside:
                yield inside  # type: ignore[misc]
        else:
            yield file


# JSON


def _json_lines(path: Path) -> Iterator[Record]:
    with _opened(path) as file:
        yield from json_lines(file, MAX_RECORD_BYTES)


def _json(path: Path) -> Iterator[Record]:
    """Read a list of objects, an object a line, or objects over several lines."""
    with _opened(path) as file:
        by_line = is_json_lines(path, file, MAX_RECORD_BYTES)
    with _opened(path) as file:
        if by_line:
            yield from json_lines(file, MAX_RECORD_BYTES)
        else:
            yield from json_values(path, file, MAX_RECORD_BYTES)


# Tables of text


def _separated(delimiter: str) -> Reader:
    def read(path: Path) -> Iterator[Record]:
        # surrogateescape carries bytes that are not UTF-8 through to the record they belong to.
        with (
            _opened(path) as file,
            io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text,
        ):
            yield from _table(path, text, delimiter)

    return read


def _table(path: Path, text: IO[str], delimiter: str) -> Iterator[Record]:
    limit_before = csv.field_size_limit(MAX_RECORD_BYTES)  # of the process, 131,072 by default
    reader = csv.reader(_bounded_lines(path, text), strict=True, delimiter=delimiter)
    line = 1
    try:
        header = next(reader, [])
        if header and "\0" in header[0]:
            raise DataError(f"{path} is UTF-16, or no text: write it as UTF-8")
        twice = [name for name in header if name.strip() and header.count(name) > 1]
        if twice:
            raise DataError(f"{path} has two columns {twice[0]!r}: rename one")
        if len(header) == 1 and (sign := next((s for s in ";\t|" if s in header[0]), None)):
            remedy = "name it .tsv" if sign == "\t" else "write commas"
            raise DataError(f"{path} has {sign!r} between its columns: {header[0]!r}; {remedy}")
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                yield line, f"it has {counted(len(row), 'field')}, the header {len(header)}"
            elif row:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:  # nothing after a broken quotation can be trusted
        raise DataError(f"{path}, line {line}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit_before)


def _bounded_lines(path: Path, text: IO[str]) -> Iterator[str]:
    number = 0
    while line := text.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) > MAX_RECORD_BYTES:
            raise DataError(f"{path}, line {number}: {too_long(MAX_RECORD_BYTES)}")
        yield line


# Columns in binary


def _in_columns(read: Callable[[Path, int], Iterator[Record]]) -> Reader:
    def records(path: Path) -> Iterator[Record]:
        if path.suffix.lower() == ".gz":
            raise UserError(f"{path}: this format is compressed inside; unpack it with gunzip")
        yield from read(path, MAX_RECORD_BYTES)

    return records


# Plain text


def _document(path: Path) -> Iterator[Record]:
    """Read a file as one document."""
    with _opened(path) as file:
        raw = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{path} is one document and longer than {MAX_DOCUMENT_BYTES >> 20} MiB: split it, or "
            'write JSON Lines, each {"text": "..."}'
        )
    try:
        yield 1, {"text": raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")}
    except UnicodeDecodeError:
        yield 1, "not valid UTF-8"


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json-lines": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _in_columns(parquet_records),
    ".arrow": _in_columns(arrow_records),
    ".txt": _document,
}
_BY_LINE = {".jsonl", ".ndjson", ".json-lines", ".csv", ".tsv", ".txt"}
_WITH_COLUMNS = {".csv", ".tsv", ".parquet", ".arrow"}
