"""Rows of more text than is tokenised at once: file, line and reason, before that is tried."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from swlora.data import examples
from swlora.data.rows import read_rows
from swlora.errors import DataError

LONG = "é" * 150  # 300 bytes
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": LONG}]
SHORT = {"prompt": "a", "completion": "b"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MAX_TEXT_BYTES", 301)


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ab", "completion": LONG},
        {"prompt": LONG, "completion": "ab"},
        {"messages": CHAT},
        {"instruction": "ab", "output": LONG},
    ],
)
def test_a_row_of_json(row, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", SHORT, row, SHORT)
    expected = f"{path}, line 2: it is too long (302 bytes of text, and 301 is the most)"
    with pytest.raises(DataError) as refused:
        read_rows([path], {}, skip_bad_rows=False)
    assert str(refused.value).startswith(expected)
    rows = read_rows([path], {}, skip_bad_rows=True)
    assert len(rows.examples) == 2 and rows.bad == {"it is too long": 1}


def test_a_row_of_a_table(tmp_path):
    rows = [SHORT, {"prompt": "ab", "completion": LONG}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(f"prompt,completion\na,b\nab,{LONG}\n")
    for name, place in (("a.parquet", "row 2"), ("a.csv", "line 3")):
        with pytest.raises(DataError, match=f"{name}, {place}: it is too long"):
            read_rows([tmp_path / name], {}, skip_bad_rows=False)


def test_as_much_as_may_be_is_taken_and_a_document_is_cut_later(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": LONG}, {"text": LONG * 3})
    assert len(read_rows([path], {}, skip_bad_rows=False).examples) == 2
