"""Files that may be damaged or somebody else's: regular ones only, and no more bytes than expected.

JSON is taken as it is written here: every number finite and short, no value deeper than MAX_DEPTH.
So whoever works on with it meets no infinity, no number that takes minutes, no endless recursion.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MAX_BYTES = 64 << 20  # of a JSON file: the metrics of a million steps are less
MAX_DEPTH = 64
MAX_DIGITS = 40


class UnreadableError(ValueError):
    """A file is not there, no regular file, too long, or no JSON of the kind that is written here.

    Its message is the reason alone, in a few words.
    """


def read_bounded(path: Path, max_bytes: int, *, follow_links: bool = True) -> tuple[bytes, bool]:
    """Return (the first `max_bytes` of a regular file, whether that is all); UnreadableError.

    A pipe or a device is never waited for.
    """
    with regular_file(path, follow_links=follow_links) as file:
        content = file.read(max_bytes + 1)
    return content[:max_bytes], len(content) <= max_bytes


def read_tail(path: Path, max_bytes: int, from_byte: int = 0) -> bytes:
    """Return the last `max_bytes` of a regular file that is no link, none before `from_byte`.

    Raises UnreadableError.
    """
    with regular_file(path, follow_links=False) as file:
        file.seek(max(from_byte, file.seek(0, os.SEEK_END) - max_bytes))
        return file.read(max_bytes)


def read_json_value(path: Path, *, max_bytes: int = MAX_BYTES, follow_links: bool = True) -> Any:
    """Return the JSON value in a file; UnreadableError where there is none of the expected kind."""
    content, is_whole = read_bounded(path, max_bytes, follow_links=follow_links)
    if not is_whole:
        raise UnreadableError(f"it is longer than {max_bytes:,} bytes")
    return parse_json(content)


def read_json_object(
    path: Path, *, max_bytes: int = MAX_BYTES, follow_links: bool = True
) -> dict[str, Any]:
    """Return the JSON object in a file; UnreadableError where there is none."""
    value = read_json_value(path, max_bytes=max_bytes, follow_links=follow_links)
    if not isinstance(value, dict):
        raise UnreadableError("it holds no JSON object")
    return value


def parse_json(text: str | bytes) -> Any:
    """Return the value that a JSON text is; UnreadableError."""
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_number,
        )
    except UnreadableError:
        raise
    except RecursionError:
        raise UnreadableError(f"it is deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise UnreadableError("it is no JSON") from error
    _check_depth(value)
    return value


@contextmanager
def regular_file(path: Path, *, follow_links: bool) -> Iterator[BinaryIO]:
    """Open a regular file to be read; UnreadableError, also for what goes wrong while it is."""
    no_links = 0 if follow_links else getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | no_links)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnreadableError("it is no regular file")
            yield file
    except OSError as error:
        is_link = error.errno == errno.ELOOP and not follow_links
        reason = "it is a link" if is_link else error.strerror or str(error)
        raise UnreadableError(reason) from error


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise UnreadableError(f"a number in it has {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise UnreadableError("a number in it is not finite")
    return number


def _no_number(_name: str) -> NoReturn:
    raise UnreadableError("a number in it is not finite")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [item for one in level for item in items(one)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise UnreadableError(f"it is deeper than {MAX_DEPTH} levels")


def items(value: Any) -> list[Any]:
    """Return the values in a mapping or list; none of any other value."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
