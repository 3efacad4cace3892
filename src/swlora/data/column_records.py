"""Records of files in columns: Parquet, and Arrow as a stream or with an index.

A few rows are turned into Python values at a time, fewer where they are long, and not before they
were found valid: the offsets of a damaged file point anywhere.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swlora.data.json_records import READ_BYTES, Record, too_long
from swlora.errors import DataError

_ROWS_AT_ONCE = 512
_BYTES_AT_ONCE = 16 << 20  # of rows that are held as values


def parquet_records(path: Path, max_bytes: int) -> Iterator[Record]:
    """Yield the rows of a Parquet file; DataError for one that is damaged as a whole."""
    import pyarrow.parquet

    with _damage_named(path, "Parquet"), path.open("rb") as file:
        # Pages are read when they are needed; by default, all columns of a row group before.
        table = pyarrow.parquet.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)
        yield from _numbered(_row_groups(table), max_bytes)


def _row_groups(table: Any) -> Iterator[Any]:
    for i in range(table.num_row_groups):
        group = table.metadata.row_group(i)
        n_rows = _BYTES_AT_ONCE * group.num_rows // max(1, group.total_byte_size)
        yield from table.iter_batches(max(1, min(n_rows, _ROWS_AT_ONCE)), row_groups=[i])


def arrow_records(path: Path, max_bytes: int) -> Iterator[Record]:
    """Yield the rows of an Arrow file; DataError for one that is damaged as a whole."""
    import pyarrow

    with _damage_named(path, "Arrow"), path.open("rb") as opened:  # an error that names the file
        is_indexed = opened.read(6) == b"ARROW1"
        with pyarrow.memory_map(str(path)) as file:  # a batch may be the whole file
            if is_indexed:
                table = pyarrow.ipc.open_file(file)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
                yield from _numbered(batches, max_bytes)
            else:
                yield from _numbered(pyarrow.ipc.open_stream(file), max_bytes)


def without_nulls(value: Any) -> Any:
    """Return a value without the fields of structs that are null.

    A table has one struct for a column, with the fields of all its rows: null says that a row had
    no such field, such as an argument of another row's call.
    """
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def record_of(row: Mapping[str, Any], max_bytes: int) -> dict[str, Any] | str:
    """Return a row of a table as a record, or that it is too long."""
    if _size(row) > max_bytes:
        return too_long(max_bytes)
    return {name: without_nulls(value) for name, value in row.items()}


@contextmanager
def _damage_named(path: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not from the format's reader
            raise
        raise DataError(f"{path} is not a whole {kind} file: {_brief(error)}") from error


def _numbered(batches: Iterator[Any], max_bytes: int) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            for record in _records(batch.slice(start, _ROWS_AT_ONCE), max_bytes):
                number += 1
                yield number, record


def _records(batch: Any, max_bytes: int) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a batch; by itself each, where they are long or one of them is damaged."""
    rows = _values(batch) if batch.nbytes <= _BYTES_AT_ONCE else "long"
    for i in range(batch.num_rows):
        values = _values(batch.slice(i, 1)) if isinstance(rows, str) else rows[i : i + 1]
        yield values if isinstance(values, str) else record_of(values[0], max_bytes)


def _values(batch: Any) -> list[dict[str, Any]] | str:
    """Return rows as Python values, or why they are none."""
    try:
        batch.validate(full=True)
        values: list[dict[str, Any]] = batch.to_pylist()
    # Of pyarrow, and of what it asks for dates: out of Python's years, or of unknown zones.
    except (ValueError, OverflowError, LookupError) as error:
        return f"not valid values ({_brief(error)})"
    return values


def _size(value: Any) -> int:
    """Return the characters in a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:100]
