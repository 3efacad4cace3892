"""Records of JSON: an object a line, or values of one text, each held by itself.

Values are read by the json module from a buffer that grows until one is whole, so that no record
costs more than its own length: neither a long file nor a deep one can fill the memory.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from swlora.errors import DataError

Record = tuple[int, dict[str, Any] | str]  # number in the file; values by column, or what is wrong
READ_BYTES = 1 << 16

_NO_OBJECT = "not a JSON object"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_skip_space = re.compile(r"[ \t\r\n]*").match


def too_long(max_bytes: int) -> str:
    """Say that a record is longer than any may be."""
    return f"it is longer than {max_bytes >> 20} MiB"


def json_lines(file: IO[bytes], max_bytes: int) -> Iterator[Record]:
    """Yield an object a line; lines are numbered from 1, and blank ones are none."""
    number = 0
    while raw := file.readline(max_bytes + 1):
        number += 1
        if len(raw) > max_bytes:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(READ_BYTES)
            yield number, too_long(max_bytes)
        elif (line := raw.removeprefix(codecs.BOM_UTF8)).strip():
            yield number, _parsed(line)


def _parsed(raw: bytes) -> dict[str, Any] | str:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return "not valid UTF-8"
    except (ValueError, RecursionError) as error:
        at = f", character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        return f"not valid JSON ({_brief(error)}{at})"
    return record if isinstance(record, dict) else _NO_OBJECT


def is_json_lines(path: Path, file: IO[bytes], max_bytes: int) -> bool:
    """Say whether a JSON file begins with an object that ends on its line.

    Raises DataError for one that begins with neither an object nor a list.
    """
    begin = file.read(READ_BYTES)
    if begin.startswith(_UTF16):
        raise DataError(f"{path} is UTF-16: write it as UTF-8")
    sign = begin.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if sign not in (b"{", b"[", b""):
        raise DataError(f"{path} is neither a JSON list of objects nor an object a line")
    file.seek(0)
    lines = json_lines(file, max_bytes) if sign == b"{" else iter(())
    return isinstance(next(lines, (0, ""))[1], dict)


def json_values(path: Path, file: IO[bytes], max_bytes: int) -> Iterator[Record]:
    """Yield the objects of a list, or those that stand one behind the other; numbered from 1.

    Raises DataError, with the number, for text that is no JSON: nothing behind it can be told.
    """
    text = _Buffer(file)
    in_list, number = text.peek() == "[", 0
    if in_list:
        text.drop(1)
    while text.peek() and not (in_list and text.peek() == "]"):
        number += 1
        try:
            value = text.value(max_bytes)
            if in_list and text.peek() not in (",", "]"):
                raise ValueError("the list does not go on with a comma, and does not end")
            if in_list and text.peek() == ",":
                text.drop(1)
                if text.peek() == "]":
                    raise ValueError("a comma before the end of the list")
        except _TooLongError as error:
            raise DataError(f"{path}, row {number}: {too_long(max_bytes)}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, row {number}: not valid JSON ({_brief(error)})") from error
        yield number, value if isinstance(value, dict) else _NO_OBJECT
    if in_list and not text.peek():
        raise DataError(f"{path}, row {number + 1}: not valid JSON (the list does not end)")
    text.drop(1)
    if in_list and text.peek():
        raise DataError(f"{path}: not valid JSON (something stands behind its list)")


class _TooLongError(Exception):
    pass


class _Buffer:
    """What was read of a text and not used yet."""

    def __init__(self, file: IO[bytes]) -> None:
        # surrogateescape carries bytes that are not UTF-8 through to the record they belong to.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._file, self._text, self._at, self._is_all = file, "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is no space, "" at the end."""
        while True:
            self._at = self._end_of_space()
            if self._at < len(self._text) or self._is_all:
                return self._text[self._at : self._at + 1]
            self._read_on(READ_BYTES)

    def drop(self, n: int) -> None:
        """Pass over characters."""
        self._at += n

    def value(self, max_bytes: int) -> Any:
        """Return the next value; ValueError for none, RecursionError for one that is too deep."""
        while True:
            self._at = self._end_of_space()
            try:
                value, end = self._decode(self._text, self._at)
            except ValueError:
                if self._is_all:
                    raise
            else:  # a number that ends with the buffer may go on
                if end < len(self._text) or self._is_all:
                    self._at = end
                    return value
            if (n_waiting := len(self._text) - self._at) > max_bytes:
                raise _TooLongError
            self._read_on(max(READ_BYTES, n_waiting))  # doubled: a long value is tried log n times

    def _end_of_space(self) -> int:
        space = _skip_space(self._text, self._at)
        return space.end() if space else self._at

    def _read_on(self, n_bytes: int) -> None:
        raw = self._file.read(n_bytes)
        self._is_all = not raw
        self._text = self._text[self._at :] + self._decoder.decode(raw, final=not raw)
        self._at = 0


def _brief(error: Exception) -> str:
    """Return what a parser says, without places in a buffer that nobody sees."""
    said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return " ".join(said.split())[:100]
