"""Files that may be anything: what is no regular file of the expected kind is refused, at once."""

import json
import os

import pytest

from swlora.bounded_read import (
    MAX_DEPTH,
    UnreadableError,
    parse_json,
    read_bounded,
    read_json_object,
    read_json_value,
    read_tail,
)

NO_FILE = r"regular file|directory"


@pytest.mark.parametrize("value", [{}, [1, 2.5, None, True, "ü\ud800"], {"a": {"b": [[]]}}, "x"])
def test_what_is_written_is_read(value, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    assert read_json_value(path) == value == parse_json(json.dumps(value).encode())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ('{"a": NaN}', "not finite"),
        ('{"a": [-Infinity]}', "not finite"),
        ('{"a": 1e999}', "not finite"),
        (f'{{"a": {"9" * 41}}}', "41 digits"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "deeper than 64"),
        ('{"a":' * (MAX_DEPTH + 2) + "1" + "}" * (MAX_DEPTH + 2), "deeper than 64"),
        (b"\xff\xfe", "no JSON"),
    ],
)
def test_other_json_than_is_written_here_is_refused(text, reason, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UnreadableError, match=reason):
        read_json_value(path)


def test_the_deepest_that_is_taken(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert read_json_value(path)
    path.write_text(f'{{"a": {"9" * 40}}}')
    assert read_json_object(path) == {"a": int("9" * 40)}


def test_an_object_is_asked_for(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    with pytest.raises(UnreadableError, match="no JSON object"):
        read_json_object(path)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    target.write_text("{}")
    link.symlink_to(target)
    for path in (pipe, tmp_path):
        with pytest.raises(UnreadableError, match=NO_FILE):
            read_bounded(path, 10)
        with pytest.raises(UnreadableError, match=NO_FILE):
            read_tail(path, 10)
    with pytest.raises(UnreadableError, match="No such file"):
        read_bounded(tmp_path / "absent", 10)
    assert read_bounded(link, 10) == (b"{}", True)
    with pytest.raises(UnreadableError, match="it is a link"):
        read_bounded(link, 10, follow_links=False)
    with pytest.raises(UnreadableError, match="it is a link"):
        read_tail(link, 10)


def test_no_more_is_read_than_was_asked_for(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    assert read_bounded(path, 10) == (b"0123456789", True)
    assert read_bounded(path, 9) == (b"012345678", False)
    assert read_tail(path, 3) == b"789"
    assert read_tail(path, 30) == b"0123456789"
    assert [read_tail(path, 3, at) for at in (2, 8, 20)] == [b"789", b"89", b""]
    with pytest.raises(UnreadableError, match="longer than 9 bytes"):
        read_json_value(path, max_bytes=9)
