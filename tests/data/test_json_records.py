"""Values of JSON are read one at a time, whatever their length, depth or the place of a read."""

import io
import json
import tracemalloc
from pathlib import Path

import pytest

from swlora.data import json_records
from swlora.data.json_records import is_json_lines, json_lines, json_values
from swlora.errors import DataError

PATH = Path("a.json")
ROWS = [{"a": 'é "]},{\\', "n": [1, {"b": None}]}, {"a": "x" * 90, "n": -1.5e3}, {"a": "𝄞"}]


def values(raw: bytes, max_bytes: int = 1 << 20) -> list[object]:
    return [record for _, record in json_values(PATH, io.BytesIO(raw), max_bytes)]


@pytest.mark.parametrize("n_bytes", [1, 2, 3, 7, 64, 1 << 16])
@pytest.mark.parametrize("indent", [None, 2])
def test_values_are_whole_wherever_a_read_ends(n_bytes, indent, monkeypatch) -> None:
    monkeypatch.setattr(json_records, "READ_BYTES", n_bytes)
    in_list = json.dumps(ROWS, indent=indent, ensure_ascii=False)
    behind = "\n".join(json.dumps(row, indent=indent) for row in ROWS)
    for text in (in_list, f" {in_list}\n", f"\ufeff{in_list}", behind):
        assert values(text.encode()) == ROWS
    assert values(b"[]") == values(b"[ ]\n") == []
    no_object = "not a JSON object"
    assert values(b'[12, {"a": 123}, "b"]') == [no_object, {"a": 123}, no_object]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'[{"a": 1}, {"a": ', "row 2: not valid JSON"),
        (b'[{"a": 1}, nonsense]', "row 2: not valid JSON"),
        (b'[{"a": 1} {"a": 2}]', "row 1: not valid JSON .the list does not go on with a comma"),
        (b'[{"a": 1},]', "row 1: not valid JSON .a comma before the end"),
        (b'[{"a": 1}', "row 1: not valid JSON .the list does not go on"),
        (b"[", "row 1: not valid JSON .the list does not end"),
        (b'[{"a": 1}] {', "a.json: not valid JSON .something stands behind its list"),
        (b'{"a": 1} x', "row 2: not valid JSON"),
        (b'[{"a": %s}]' % (b"9" * 5000), "row 1: not valid JSON"),
    ],
)
def test_what_is_no_json_is_refused_by_row(raw: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        values(raw)


def test_a_value_as_deep_as_it_is_long_costs_no_more_than_its_length() -> None:
    deep = b'[{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}]"
    tracemalloc.start()
    with pytest.raises(DataError, match=r"row 1: not valid JSON .maximum recursion"):
        values(deep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_long_value_is_refused_before_it_is_read() -> None:
    file = io.BytesIO(b'[{"a": 1}, {"a": "' + b"x" * (8 << 20) + b'"}]')
    with pytest.raises(DataError, match="row 2: it is longer than 1 MiB"):
        list(json_values(PATH, file, 1 << 20))
    assert file.tell() < 4 << 20


def test_bytes_that_are_no_text_stay_in_their_record() -> None:
    """Those of another record are text all the same."""
    first, second = values(b'[{"a": "\xff"}, {"a": "\xc3\xa9"}]')
    assert second == {"a": "é"} and first == {"a": "\udcff"}


def test_both_readers_take_what_python_writes_for_a_missing_number() -> None:
    raw = b'{"text": "a", "score": NaN}'
    ((_, record),) = json_lines(io.BytesIO(raw), 100)
    assert repr([record]) == repr(values(raw)) == repr(values(b"[" + raw + b"]"))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'\xef\xbb\xbf\n {"a": 1}\n{nonsense}', True),
        (b'{\n"a": 1}', False),
        (b'[{"a": 1}]', False),
        (b"", False),
    ],
)
def test_an_object_a_line_is_told_by_the_first(raw: bytes, expected: bool) -> None:
    assert is_json_lines(PATH, io.BytesIO(raw), 100) is expected


@pytest.mark.parametrize(
    ("raw", "said"), [(b'"text"', "neither a JSON list"), ("[]".encode("utf-16"), "UTF-16")]
)
def test_a_file_of_something_else_is_refused(raw: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        is_json_lines(PATH, io.BytesIO(raw), 100)
