"""Files that are either complete or absent: written beside the target, flushed, renamed over it.

JSON is strict: a NaN or an infinity is refused here rather than by the reader.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swlora.bounded_read import MAX_BYTES, UnreadableError, read_json_object
from swlora.errors import RunFailedError, UserError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside `target`; rename it over `target` when the body succeeds.

    Raises RunFailedError (one line, with the path) where the disk is full or not writable.
    """
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        os.close(handle)
        scratch = Path(name)
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.chmod(0o644)
        scratch.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise RunFailedError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def check_writable(folder: Path, flag: str) -> None:
    """Refuse a folder, named by `flag`, that is a file, lies below one or cannot be written in."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{place} is a file and no folder; choose another {flag}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} may not be written in; choose another {flag}")


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(target) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write strict JSON atomically; RunFailedError where a number in it is not finite."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RunFailedError(f"cannot write {target}: a number in it is not finite") from error
    write_text(target, text + "\n")


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file, no link to one, or UserError with the reason."""
    try:
        return read_json_object(path, max_bytes=max_bytes, follow_links=False)
    except UnreadableError as error:
        raise UserError(f"{path.parent} holds no readable {path.name}: {error}") from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(scratch: Path, target: Path) -> None:
    """Put the complete folder `scratch` into the place of the folder `target`.

    A kill at any moment leaves one of the two, for `restore_folder` to put right. Raises OSError.
    """
    restore_folder(target)
    for path in scratch.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    previous = _previous(target)
    if target.exists():
        target.replace(previous)
    scratch.replace(target)
    _sync_folder(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Put back the folder `target` where a `replace_folder` was killed before its end."""
    previous = _previous(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
    elif previous.exists():
        previous.replace(target)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}-previous")


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
