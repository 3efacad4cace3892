"""Rows of Parquet and Arrow: damage is named by file or row, and few rows are held at a time."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from swlora.data import column_records
from swlora.data.column_records import arrow_records, parquet_records
from swlora.data.json_records import too_long
from swlora.errors import DataError

MAX_BYTES = 1 << 20


def write_stream(path: Path, table: Any) -> Path:
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as w:
        w.write_table(table)
    return path


def with_bytes(raw: list[bytes]) -> Any:
    """Return a column of strings with these bytes, valid or not."""
    buffers = pyarrow.array(raw, pyarrow.binary()).buffers()
    return pyarrow.Array.from_buffers(pyarrow.string(), len(raw), buffers)


def test_text_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    table = pyarrow.table({"text": with_bytes([b"a", b"b\xff", b"c"])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write_stream(tmp_path / "a.arrow", table)
    for records in (
        list(parquet_records(tmp_path / "a.parquet", MAX_BYTES)),
        list(arrow_records(tmp_path / "a.arrow", MAX_BYTES)),
    ):
        assert records[::2] == [(1, {"text": "a"}), (3, {"text": "c"})]
        assert "not valid values (" in str(records[1][1]) and "UTF8" in str(records[1][1])


def test_offsets_that_point_elsewhere_are_never_followed(tmp_path: Path) -> None:
    """Such a file would end the process, or show its memory."""
    path = write_stream(tmp_path / "a.arrow", pyarrow.table({"text": ["aa", "bb", "cc"]}))
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 2, 4, 6))
    raw = path.read_bytes()
    assert raw.count(offsets) == 1
    path.write_bytes(raw.replace(offsets, offsets[:8] + (1 << 30).to_bytes(4, "little") * 2))
    records = [record for _, record in arrow_records(path, MAX_BYTES)]
    assert all(isinstance(record, str) or record == {"text": "aa"} for record in records)


def test_a_field_that_only_other_rows_have_is_not_there(tmp_path: Path) -> None:
    """A struct in a column has the fields of all rows."""
    calls: list[dict[str, Any]] = [{"calls": [{"a": 1, "n": 0}]}, {"calls": [{"b": ""}]}]
    table = pyarrow.Table.from_pylist([*calls, {"calls": None}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = [record for _, record in parquet_records(tmp_path / "a.parquet", MAX_BYTES)]
    assert found == [*calls, {"calls": None}]


def test_long_rows_are_read_by_themselves(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(column_records, "_BYTES_AT_ONCE", 1000)
    rows: list[dict[str, Any]] = [{"text": "a" * 400}, {"text": "b" * 2000}, {"text": "c"}] * 5
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    write_stream(tmp_path / "a.arrow", table)
    expected = [row if len(row["text"]) < 1500 else too_long(1500) for row in rows]
    for records in (
        parquet_records(tmp_path / "a.parquet", 1500),
        arrow_records(tmp_path / "a.arrow", 1500),
    ):
        assert list(records) == list(enumerate(expected, start=1))


def test_damage_inside_is_named_by_the_file(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[8:40] = b"\x5a" * 32
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet is not a whole Parquet file: ") as caught:
        list(parquet_records(tmp_path / "a.parquet", MAX_BYTES))
    assert "\n" not in str(caught.value)
    path = write_stream(tmp_path / "a.arrow", pyarrow.table({"text": ["a" * 999]}))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"a\.arrow is not a whole Arrow file: "):
        list(arrow_records(path, MAX_BYTES))
