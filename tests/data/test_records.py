"""Every format gives the same records, one at a time; what is damaged or too long is named."""

import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from swlora.data import json_records, records
from swlora.data.records import ending, has_columns, read_records, unit
from swlora.errors import DataError, UserError

ROWS = [
    {"prompt": 'a "b",\tc\nd', "completion": "é  "},
    {"prompt": "2024-05-01", "completion": "12"},
    {"prompt": "ž", "completion": ""},
]
NESTED = [{"messages": [{"role": "user", "content": "Hi", "n": 1.5}], "tools": None}] * 3


def table_text(separator: str) -> bytes:
    lines = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)]
    quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in line] for line in lines]
    return "\r\n".join(separator.join(line) for line in quoted).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=2)
    return bytes(sink.getvalue())


def arrow(rows: list[dict[str, Any]], *, is_stream: bool) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


NUMBERS = {"jsonl": [1, 3, 5], "csv": [2, 4, 5], "tsv": [2, 4, 5]}  # of the lines they begin on
FILES = {
    "a.jsonl": jsonl(ROWS),
    "b.json": b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1).encode(),
    "c.json": jsonl(ROWS),
    "d.csv": table_text(","),
    "e.TSV": b"\xef\xbb\xbf" + table_text("\t"),
    "f.parquet": parquet(ROWS),
    "g.arrow": arrow(ROWS, is_stream=True),
    "h.arrow": arrow(ROWS, is_stream=False),
    "i.jsonl.gz": gzip.compress(jsonl(ROWS), mtime=0),
    "j.csv.gz": gzip.compress(table_text(",")),
    "k.json.gz": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_records(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    found = list(read_records(path))
    assert [record for _, record in found] == ROWS
    kind = "jsonl" if name == "c.json" else ending(path)[1:]
    assert [number for number, _ in found] == NUMBERS.get(kind, [1, 2, 3])


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.parquet", "d.arrow"])
def test_nested_values_come_through(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = {
        "a.jsonl": jsonl(NESTED),
        "b.json": json.dumps(NESTED).encode(),
        "c.parquet": parquet(NESTED),
        "d.arrow": arrow(NESTED, is_stream=True),
    }
    path.write_bytes(content[name])
    assert [record for _, record in read_records(path)] == NESTED


def test_dates_stay_what_they_are(tmp_path: Path) -> None:
    """As text only text is taken; a column of dates is none."""
    when = datetime(2024, 5, 1, 12)
    (tmp_path / "a.parquet").write_bytes(parquet([{"prompt": when}]))
    assert list(read_records(tmp_path / "a.parquet")) == [(1, {"prompt": when})]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfA line.\r\n\r\nAnother.\n")
    assert list(read_records(tmp_path / "a.txt")) == [(1, {"text": "A line.\r\n\r\nAnother.\n"})]
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert list(read_records(tmp_path / "b.txt")) == [(1, "not valid UTF-8")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt.gz"])
def test_a_file_without_a_record_has_none(name: str, tmp_path: Path) -> None:
    content = b" \n" if not name.endswith("gz") else gzip.compress(b"")
    (tmp_path / name).write_bytes(content)
    found = list(read_records(tmp_path / name))
    assert found == ([] if not name.endswith("gz") else [(1, {"text": ""})])


def test_names() -> None:
    for name, expected in {
        "a.jsonl": ".jsonl",
        "a.b.CSV.GZ": ".csv",
        "a.gz": "",
        "a": "",
        "a.docx": "",
        "jsonl": "",
        ".parquet": "",
    }.items():
        assert ending(Path(name)) == expected, name
    assert [unit(Path(n)) for n in ("a.jsonl", "a.csv.gz", "a.json", "a.parquet")] == [
        *("line", "line", "row", "row")
    ]
    assert [has_columns(Path(n)) for n in ("a.jsonl", "a.csv.gz", "a.parquet")] == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"a": 1}, {"a": ', "a.json, row 2: not valid JSON"),
        ("a.json", b'[{"a": 1}, nonsense]', "a.json, row 2: not valid JSON"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "a.csv is UTF-16"),
        ("a.json", b'"text"', "a.json is neither a JSON list of objects nor an object a line"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0)[:-9], "is not a whole gzip file"),
        ("a.jsonl.gz", b"{}", "is not a whole gzip file"),
        ("a.parquet", b"PAR1 nonsense PAR1", "a.parquet is not a whole Parquet file"),
        ("a.parquet", parquet(ROWS)[:-20], "a.parquet is not a whole Parquet file"),
        ("a.arrow", b"nonsense", "a.arrow is not a whole Arrow file"),
        ("a.csv", b"a;b\n1;2\n", "a.csv has ';' between its columns: 'a;b'; write commas"),
        ("a.csv", b"a\tb\n1\t2\n", r"a.csv has '\\t' between its columns: .*; name it .tsv"),
    ],
    ids=range(11),
)
def test_a_damaged_file_is_refused_by_name(name, content, reason, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        list(read_records(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.gz"])
def test_gzip_around_what_is_compressed_inside(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match="unpack it with gunzip"):
        list(read_records(tmp_path / name))


def test_a_long_record_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never held whole; those behind it are read."""
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 300)
    monkeypatch.setattr(records, "MAX_DOCUMENT_BYTES", 300)
    monkeypatch.setattr(json_records, "READ_BYTES", 64)
    rows = [{"text": "a"}, {"text": "b" * 900}, {"text": "c"}]
    contents = {"a.jsonl": jsonl(rows), "b.parquet": parquet(rows)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found = [record for _, record in read_records(tmp_path / name)]
        assert found == [rows[0], json_records.too_long(300), rows[2]]
    (tmp_path / "c.json").write_bytes(json.dumps(rows).encode())
    with pytest.raises(DataError, match="row 2: it is longer than"):
        list(read_records(tmp_path / "c.json"))
    (tmp_path / "d.csv").write_bytes(b"text\na\n" + b"b" * 900 + b"\nc\n")
    with pytest.raises(DataError, match="line 3: it is longer than"):
        list(read_records(tmp_path / "d.csv"))
    (tmp_path / "e.txt").write_bytes(b"b" * 900)
    with pytest.raises(DataError, match="one document and longer than"):
        list(read_records(tmp_path / "e.txt"))
