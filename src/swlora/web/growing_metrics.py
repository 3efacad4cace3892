"""metrics.jsonl of runs as they grow: of a file that was read before, only what is new is read.

What is kept of a file is little, however long it is: where lines begin, and for the curves every
n-th line, where n doubles as the file grows. It depends on the file's content alone, not on when it
was read. A file that was replaced (as by a resumed run), cut, or rewritten is read anew.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from swlora.bounded_read import UnreadableError, regular_file
from swlora.metrics_file import CHECKSUM, METRICS, NotedReport, parse_line, whole_reports

MAX_FILE_BYTES = 256 << 20  # that are looked at
MAX_LINE_BYTES = 16 << 10  # a longer one is none of ours
BLOCK_BYTES = 1 << 20
MAX_STEPS = 4_000  # lines kept of a file: a picture has fewer points
MAX_HELD_OUT = 1_000  # and as many again of those with a held-out loss
MARK_EVERY = 1_000  # lines: where every so manieth begins is known
CHECKED_BYTES = 64  # at the end of what was read: still the same
MAX_FOLDERS = 8
_HELD_OUT = b'"eval_nll"'
_CHECKSUM = f'"{CHECKSUM}"'.encode()
Row = dict[str, Any]


class _EveryNth:
    """At most `limit` of many lines by their numbers: the first and every n-th after it."""

    def __init__(self, limit: int) -> None:
        self._limit, self._stride, self._n_seen = limit, 1, 0
        self.kept: dict[int, bytes] = {}

    def add(self, number: int, line: bytes) -> None:
        """Take the next line."""
        if self._n_seen % self._stride == 0:
            self.kept[number] = line
        self._n_seen += 1
        if len(self.kept) > self._limit:
            self._stride *= 2
            self.kept = dict(list(self.kept.items())[::2])


class GrowingMetrics:
    """The metrics of one folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._stamp: tuple[int, int, int] | None = None
        self._offset = 0  # behind the last line that is whole
        self._n_lines = 0
        self._has_checksums = False
        self._marks = [0]
        self._end = b""  # the last bytes before the offset
        self._unended = b""  # what stands behind the last line break
        self._newest: tuple[int, bytes] | None = None
        self._steps, self._held_out = _EveryNth(MAX_STEPS), _EveryNth(MAX_HELD_OUT)
        self._parsed: dict[int, NotedReport | None] = {}  # by number of line

    def shown(self) -> list[Row]:
        """Return the reports for a picture: every n-th, those with held-out losses, the newest."""
        with self._lock:
            self._update()
            lines = self._steps.kept | self._held_out.kept
            if self._newest:
                lines[self._newest[0]] = self._newest[1]
            self._parsed = {
                number: self._parsed[number]
                if number in self._parsed
                else parse_line(lines[number])
                for number in sorted(lines)
            }
            return self._whole([*self._parsed.values(), parse_line(self._unended)])

    def part(self, since: int, n: int) -> tuple[list[Row], int]:
        """Return (the reports in `n` lines from number `since` on, the number of the next line)."""
        with self._lock:
            self._update()
            n_whole = self._n_lines
            lines: list[bytes] = []
            if since < n_whole:
                mark = min(since // MARK_EVERY, len(self._marks) - 1)
                skipped = since - mark * MARK_EVERY
                lines = self._read_lines(self._marks[mark], skipped, min(n, n_whole - since))
            following = since + len(lines)
            if following == n_whole and len(lines) < n and parse_line(self._unended):
                lines.append(self._unended)  # whole but for its line break
                following += 1
            return self._whole(map(parse_line, lines)), following

    def _whole(self, found: Iterable[NotedReport | None]) -> list[Row]:
        has_checksums = self._has_checksums or _CHECKSUM in self._unended
        return whole_reports((one for one in found if one), has_checksums=has_checksums)

    def _read_lines(self, offset: int, n_skipped: int, n: int) -> list[bytes]:
        lines: list[bytes] = []
        try:
            with regular_file(self._path, follow_links=False) as file:
                file.seek(offset)
                for number, (_, line) in enumerate(_whole_lines(file, self._offset - offset)):
                    if number >= n_skipped:
                        lines.append(line)
                    if len(lines) == n:
                        break
        except UnreadableError:
            return []
        return lines

    def _update(self) -> None:
        """Read what is new."""
        try:
            with regular_file(self._path, follow_links=False) as file:
                found = os.fstat(file.fileno())
                stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
                if stamp == self._stamp:
                    return
                if not self._goes_on(file, stamp):
                    self._forget()
                self._stamp = stamp
                self._take_in(file, min(found.st_size, MAX_FILE_BYTES))
        except UnreadableError:
            self._forget()

    def _goes_on(self, file: BinaryIO, stamp: tuple[int, int, int]) -> bool:
        """Say whether the file is the one that was read, grown."""
        if self._stamp is None or stamp[2] != self._stamp[2] or stamp[1] < self._offset:
            return False
        file.seek(self._offset - len(self._end))
        return file.read(len(self._end)) == self._end

    def _take_in(self, file: BinaryIO, end: int) -> None:
        file.seek(self._offset)
        for n_bytes, line in _whole_lines(file, end - self._offset):
            self._offset += n_bytes
            self._add(line)
        n_checked = min(CHECKED_BYTES, self._offset)
        file.seek(self._offset - n_checked)
        self._end = file.read(n_checked)
        rest = file.read(min(end - self._offset, MAX_LINE_BYTES + 1))
        self._unended = rest if len(rest) <= MAX_LINE_BYTES else b""

    def _add(self, line: bytes) -> None:
        number = self._n_lines
        self._n_lines += 1
        if self._n_lines % MARK_EVERY == 0:
            self._marks.append(self._offset)
        self._has_checksums |= _CHECKSUM in line
        self._steps.add(number, line)
        if _HELD_OUT in line:
            self._held_out.add(number, line)
        self._newest = number, line


def _whole_lines(file: BinaryIO, n_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield (its bytes with the line break, the line without) for the lines that end within the
    next `n_bytes`; an empty line for one that is too long.
    """
    n_begun, begun = 0, b""
    while n_bytes > 0 and (block := file.read(min(BLOCK_BYTES, n_bytes))):
        n_bytes -= len(block)
        *ended, rest = block.split(b"\n")
        for part in ended:
            n_line, line = n_begun + len(part), begun + part[: MAX_LINE_BYTES + 1]
            yield n_line + 1, line if n_line <= MAX_LINE_BYTES else b""
            n_begun, begun = 0, b""
        n_begun, begun = n_begun + len(rest), (begun + rest)[: MAX_LINE_BYTES + 1]


class MetricsFiles:
    """The metrics of the folders that were asked for last."""

    def __init__(self, max_folders: int = MAX_FOLDERS) -> None:
        self._max_folders = max_folders
        self._lock = threading.Lock()
        self._known: OrderedDict[Path, GrowingMetrics] = OrderedDict()

    def of(self, folder: Path) -> GrowingMetrics:
        """Return the metrics of a folder."""
        with self._lock:
            known = self._known.setdefault(folder, GrowingMetrics(folder))
            self._known.move_to_end(folder)
            while len(self._known) > self._max_folders:
                self._known.popitem(last=False)
            return known
