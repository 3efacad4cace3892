"""The files of a folder as a zip that is made while it is sent: it lies in no memory, on no disk.

However large they are, and however many take them at once, each takes a part of a file in memory.
"""

import os
import stat
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from swlora.bounded_read import UnreadableError, regular_file

PART_BYTES = 1 << 18
MAX_FILES = 100
FIRST, LAST = (1980, 1, 1, 0, 0, 0), (2107, 12, 31, 23, 59, 58)  # times that a zip can name
Opened = Sequence[tuple[str, BinaryIO]]


class PackedFolder(StreamingResponse):
    """Sends the regular files in a folder, links left out, as they are when it is made.

    Raises UnreadableError where they cannot be opened, or are being replaced.
    """

    media_type = "application/zip"

    def __init__(self, folder: Path, file_name: str) -> None:
        with ExitStack() as opened:
            self.files = _opened(folder, opened)
            self._opened = opened.pop_all()
        plain, quoted = f'filename="{file_name}"', quote(file_name)
        named = plain if quoted == file_name else f"filename*=utf-8''{quoted}"  # RFC 6266
        headers = {"cache-control": "no-store", "content-disposition": f"attachment; {named}"}
        super().__init__(zip_parts(self.files), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them; the files are closed whatever happens, also before the first part."""
        with self._opened:
            await super().__call__(scope, receive, send)


def zip_parts(files: Opened) -> Iterator[bytes]:
    """Yield a zip of open files, by their names in it, a part of a file at a time."""
    made = _Made()
    with zipfile.ZipFile(made, "w") as packed:
        for name, file in files:
            found = os.fstat(file.fileno())
            when = time.localtime(found.st_mtime)[:6]
            info = zipfile.ZipInfo(name, min(max(when, FIRST), LAST))
            info.external_attr = 0o644 << 16
            info.file_size = left = found.st_size  # a large one has other fields
            with packed.open(info, "w") as target:
                while part := file.read(min(PART_BYTES, left)):
                    target.write(part)
                    left -= len(part)
                    yield made.taken()
    yield made.taken()


class _Made:
    """A file that is written to, without a place in it, and emptied."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        """Take a part."""
        self._parts.append(bytes(part))
        return len(part)

    def flush(self) -> None:
        """Do nothing: what was written is there."""

    def close(self) -> None:
        """Do nothing: what was written is taken afterwards."""

    def taken(self) -> bytes:
        """Return what was written since the last time."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


def _opened(folder: Path, opened: ExitStack) -> Opened:
    """Open the files of a folder, each as (its name below the folder's, file)."""
    try:
        before = folder.stat()
        paths = [path for path in sorted(folder.iterdir()) if _is_regular(path)]
        if not paths or len(paths) > MAX_FILES:
            raise UnreadableError(f"it holds {len(paths):,} files")
        files = [
            (
                f"{folder.name}/{path.name}",
                opened.enter_context(regular_file(path, follow_links=False)),
            )
            for path in paths
        ]
        if not os.path.samestat(before, folder.stat()):
            raise UnreadableError("it is being replaced just now")
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    return files


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)
