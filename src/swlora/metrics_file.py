"""metrics.jsonl of a run folder: one line a step, appended, each with a checksum of its own."""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swlora.bounded_read import UnreadableError, parse_json, read_bounded
from swlora.errors import RunFailedError
from swlora.files import sync_path, write_text

METRICS = "metrics.jsonl"
CHECKSUM = "crc32"  # the last value of a line
MAX_METRICS_BYTES = 1 << 30  # of some million steps
NotedReport = tuple[Any, dict[str, Any]]  # its checksum as noted, None in older runs


def append_metrics(folder: Path, values: Mapping[str, Any]) -> None:
    """Append one line; RunFailedError where the disk is full."""
    line = _metrics_line(values)
    path = folder / METRICS
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise RunFailedError(f"cannot write {path}: {error.strerror or error}") from error


def sync_metrics(folder: Path) -> None:
    """Have the lines on the disk; RunFailedError where they cannot be."""
    path = folder / METRICS
    try:
        if path.exists():
            sync_path(path)
    except OSError as error:
        raise RunFailedError(f"cannot write {path}: {error.strerror or error}") from error


def truncate_metrics(folder: Path, after_step: int) -> None:
    """Drop the lines of steps after `after_step`, and those that are torn or damaged."""
    kept = [row for row in read_metrics(folder, strict=True) if row["step"] <= after_step]
    write_text(folder / METRICS, "".join(_metrics_line(row) + "\n" for row in kept))


def read_metrics(folder: Path, *, strict: bool = False) -> list[dict[str, Any]]:
    """Read metrics.jsonl, empty before the first step, without lines that are torn or damaged.

    With `strict`, raises RunFailedError where the file is there and cannot be read whole.
    """
    path = folder / METRICS
    try:
        content, is_whole = read_bounded(path, MAX_METRICS_BYTES, follow_links=False)
    except UnreadableError as error:
        if strict and os.path.lexists(path):
            raise RunFailedError(f"{path} cannot be read: {error}") from error
        return []
    if strict and not is_whole:
        raise RunFailedError(f"{path} is longer than {MAX_METRICS_BYTES:,} bytes")
    return parse_metrics(content.splitlines())


def parse_metrics(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return the reports in lines of metrics.jsonl, without those that are torn or damaged."""
    return whole_reports(noted for line in lines if (noted := parse_line(line)))


def parse_line(line: bytes) -> NotedReport | None:
    """Return the report in a line, and the checksum noted with it; None where it is torn."""
    try:
        row = parse_json(line)
    except UnreadableError:
        return None
    if isinstance(row, dict) and isinstance(row.get("step"), int):
        return row.pop(CHECKSUM, None), row
    return None


def whole_reports(
    found: Iterable[NotedReport], *, has_checksums: bool | None = None
) -> list[dict[str, Any]]:
    """Return the reports that are as they were written.

    `has_checksums` says whether the file has some, as all but older runs have; None: as these say.
    """
    rows = list(found)
    if has_checksums is None:
        has_checksums = any(noted is not None for noted, _ in rows)
    return [row for noted, row in rows if not has_checksums or noted == _checksum(row)]


def _metrics_line(values: Mapping[str, Any]) -> str:
    return json.dumps({**values, CHECKSUM: _checksum(values)}, allow_nan=False)


def _checksum(values: Mapping[str, Any]) -> int:
    """Return the crc32 of a report as JSON: its names, their order, and every digit."""
    return zlib.crc32(json.dumps(values).encode())
