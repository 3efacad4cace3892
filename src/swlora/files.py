"""Files that are either complete or absent: written beside the target, synced, renamed over it.

What a killed process leaves beside a target has a name of its own, by which `remove_scratch` knows
it. JSON is strict: a NaN or an infinity is refused here rather than by the reader.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swlora.bounded_read import MAX_BYTES, UnreadableError, read_json_object
from swlora.errors import RunFailedError, UserError

_SCRATCH_END = ".partial"  # of hidden names: what is not complete yet


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside `target`; rename it over `target` when the body succeeds.

    Raises RunFailedError (one line, with the path) where the disk is full or not writable.
    """
    scratch: Path | None = None
    try:
        make_folder(target.parent)
        handle, name = tempfile.mkstemp(_SCRATCH_END, f".{target.name}-", target.parent)
        os.close(handle)
        scratch = Path(name)
        yield scratch
        scratch.chmod(0o644)
        sync_path(scratch)
        scratch.replace(target)
        sync_path(target.parent)
    except OSError as error:
        raise RunFailedError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Have a file's bytes, or a folder's names, where a power cut does not lose them."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_files(paths: Sequence[Path], remedy: str) -> None:
    """Remove files of one folder, those that are there, so that a power cut leaves them removed.

    Raises RunFailedError, with `remedy`, where that cannot be done.
    """
    there = [path for path in paths if os.path.lexists(path)]
    try:
        for path in there:
            path.unlink()
        if there:
            sync_path(there[0].parent)
    except OSError as error:
        what = error.filename or f"files of {paths[0].parent} for good"
        raise RunFailedError(
            f"cannot remove {what}: {error.strerror or error}; {remedy}"
        ) from error


def make_folder(folder: Path, *, exist_ok: bool = True) -> None:
    """Make a folder, and those above it that are missing, so that a power cut leaves them.

    Raises OSError; FileExistsError where it is there and, by `exist_ok`, must not be.
    """
    missing = [path for path in folder.parents if not path.exists()]
    for path in (*reversed(missing), folder):
        is_new = not path.exists()
        path.mkdir(exist_ok=exist_ok or path != folder)
        if is_new:
            sync_path(path.parent)


def is_scratch(name: str) -> bool:
    """Say whether a file or folder of this name is one that is not complete yet."""
    return name.startswith(".") and name.endswith(_SCRATCH_END)


def remove_scratch(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`, where nobody writes now."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if not is_scratch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_writable(folder: Path, flag: str) -> None:
    """Refuse a folder, named by `flag`, that is a file, lies below one or cannot be written in."""
    place = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
    if not place.is_dir():
        raise UserError(f"{place} is a file and no folder; choose another {flag}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} may not be written in; choose another {flag}")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # the folder above it may not be looked into, which is found next
        return False


def read_text(path: Path, what: str = "") -> str:
    """Return the text in a person's file, in UTF-8; UserError, with `what` it is, for no such."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"it is no UTF-8 text ({error})"
        raise UserError(f"cannot read {what}{path}: {reason}") from error


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
    """Return the JSON object in a file, no link to one, or UserError with the reason.

    For what is written here: runs, studies and their like. A model's or an adapter's folder may be
    one of the Hub's cache, where every file is a link (`read_model_json`, `read_config`).
    """
    try:
        return read_json_object(path, max_bytes=max_bytes, follow_links=False)
    except UnreadableError as error:
        raise UserError(f"{path.parent} holds no readable {path.name}: {error}") from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scratch_folder(target: Path) -> Path:
    """Return where the content of the folder `target` is put together, for `replace_folder`."""
    return target.with_name(f".{target.name}{_SCRATCH_END}")


def replace_folder(scratch: Path, target: Path) -> None:
    """Put the complete folder `scratch` into the place of the folder `target`.

    A kill at any moment leaves one of the two, for `restore_folder` to put right. Raises OSError.
    """
    restore_folder(target)
    for path in sorted(scratch.rglob("*"), reverse=True):  # files before the folders they are in
        if path.is_dir() or path.is_file():
            sync_path(path)
    sync_path(scratch)
    previous = _previous(target)
    if target.exists():
        target.replace(previous)
    scratch.replace(target)
    sync_path(target.parent)
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
