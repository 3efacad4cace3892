"""Records of files: what stands in them, by column, before anybody asks what it means.

JSON Lines, JSON (a list), CSV, TSV, Parquet, Arrow and plain text, each also with gzip around it,
read one record at a time. A record that cannot be read is its reason instead. Nothing is
converted: a date in a Parquet column stays one, so that it is not taken for text.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from swlora.errors import DataError, UserError

MAX_RECORD_BYTES = 64 << 20  # of a record in its file; nobody trains on a longer one
_ROWS_AT_ONCE = 64  # of a Parquet or Arrow file
_READ_BYTES = 1 << 16

Record = tuple[int, dict[str, Any] | str]  # number in the file; values by column, or what is wrong
Reader = Callable[[Path], Iterator[Record]]

_TOO_LONG = f"it is longer than {MAX_RECORD_BYTES >> 20} MiB"


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
        yield from _lines_of(file)


def _lines_of(file: IO[bytes]) -> Iterator[Record]:
    number = 0
    while raw := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(raw) > MAX_RECORD_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(_READ_BYTES)
            yield number, _TOO_LONG
        elif raw.strip():
            yield number, _parsed(raw.removeprefix(codecs.BOM_UTF8))


def _parsed(raw: bytes) -> dict[str, Any] | str:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return "not valid UTF-8"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON ({error})"
    return record if isinstance(record, dict) else "not a JSON object"


def _json_list(path: Path) -> Iterator[Record]:
    """Read a list of objects; a file that begins with an object is read as JSON Lines."""
    with _opened(path) as file:
        begin = file.read(_READ_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if not begin:
        return
    if begin == b"{":
        yield from _json_lines(path)
        return
    if begin != b"[":
        raise DataError(f"{path} is neither a JSON list of objects nor an object a line")
    import ijson

    with _opened(path) as file:
        bounded = _Bounded(file)
        items = ijson.items(bounded, "item", use_float=True, buf_size=_READ_BYTES)
        number = 0
        while True:
            number, bounded.n_left = number + 1, MAX_RECORD_BYTES + _READ_BYTES
            try:
                item = next(items)
            except StopIteration:
                return
            except (ijson.JSONError, UnicodeDecodeError) as error:
                said = " ".join(str(error).split())[:100]
                raise DataError(f"{path}, row {number}: not valid JSON ({said})") from error
            except _TooLongError as error:
                raise DataError(f"{path}, row {number}: {_TOO_LONG}") from error
            yield number, item if isinstance(item, dict) else "not a JSON object"


class _TooLongError(Exception):
    pass


class _Bounded:
    """A file of which no more than `n_left` bytes may be read on."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        head = file.read(len(codecs.BOM_UTF8))
        self._head = head.removeprefix(codecs.BOM_UTF8)
        self.n_left = 0

    def read(self, n: int = -1) -> bytes:
        if not n:  # asked to see whether the file is binary
            return b""
        head, self._head = self._head, b""
        data = head + self._file.read(n)
        self.n_left -= len(data)
        if data and self.n_left < 0:
            raise _TooLongError
        return data


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
    reader = csv.reader(text, strict=True, delimiter=delimiter)
    line = 1
    try:
        header = next(reader, [])
        twice = [name for name in header if name.strip() and header.count(name) > 1]
        if twice:
            raise DataError(f"{path} has two columns {twice[0]!r}: rename one")
        if len(header) == 1 and (sign := next((s for s in ";\t|" if s in header[0]), None)):
            remedy = "name it .tsv" if sign == "\t" else "write commas"
            raise DataError(f"{path} has {sign!r} between its columns: {header[0]!r}; {remedy}")
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                yield line, f"it has {len(row)} fields, the header {len(header)}"
            elif row:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:  # nothing after a broken quotation can be trusted
        raise DataError(f"{path}, line {line}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit_before)


# Columns in binary


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    _refuse_gzip(path)
    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            yield from _numbered(table.iter_batches(batch_size=_ROWS_AT_ONCE))
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is not a whole Parquet file: {_brief(error)}") from error


def _arrow(path: Path) -> Iterator[Record]:
    """Read the stream that `datasets` writes, or a file with an index."""
    import pyarrow

    _refuse_gzip(path)
    with path.open("rb") as file:
        is_indexed = file.read(6) == b"ARROW1"
        file.seek(0)
        try:
            if is_indexed:
                table = pyarrow.ipc.open_file(file)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(file))
            yield from _numbered(
                batch.slice(start, _ROWS_AT_ONCE)
                for batch in batches
                for start in range(0, batch.num_rows, _ROWS_AT_ONCE)
            )
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is not a whole Arrow file: {_brief(error)}") from error


def _numbered(batches: Iterator[Any]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield number, record if _size(record) <= MAX_RECORD_BYTES else _TOO_LONG


def _size(value: Any) -> int:
    """Return the characters in a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def _refuse_gzip(path: Path) -> None:
    if path.suffix.lower() == ".gz":
        raise UserError(f"{path}: this format is compressed inside; unpack it with gunzip")


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


# Plain text


def _document(path: Path) -> Iterator[Record]:
    """Read a file as one document."""
    with _opened(path) as file:
        raw = file.read(MAX_RECORD_BYTES + 1)
    if len(raw) > MAX_RECORD_BYTES:
        raise DataError(
            f"{path} is one document and longer than {MAX_RECORD_BYTES >> 20} MiB: split it, or "
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
    ".json": _json_list,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _document,
}
_BY_LINE = {".jsonl", ".ndjson", ".json-lines", ".csv", ".tsv", ".txt"}
_WITH_COLUMNS = {".csv", ".tsv", ".parquet", ".arrow"}
