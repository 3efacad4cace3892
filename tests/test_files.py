"""Atomic files: complete or absent, whatever happens in between; JSON without NaN."""

import errno
import json
import os
from pathlib import Path

import pytest

from swlora.errors import RunFailedError
from swlora.files import (
    atomic_path,
    make_folder,
    remove_scratch,
    scratch_folder,
    write_json,
    write_text,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(error: BaseException):
    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


def test_text_is_written_and_replaced(tmp_path):
    target = tmp_path / "new" / "folder" / "a.txt"
    for text in ("erst\n", "dann: ü\r\n\u2028"):
        write_text(target, text)
        assert target.read_bytes() == text.encode()
    assert only(target.parent) == ["a.txt"]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_failure_in_the_body_leaves_the_old_file(error, tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as scratch:
        scratch.write_text("half of the ne")
        assert target.read_text() == "old"
        raise error
    assert target.read_text() == "old"
    assert only(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace", "write_text"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(call, tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    target.write_text("old")
    owner = os if call == "fsync" else Path
    with monkeypatch.context() as patch, pytest.raises(RunFailedError) as failed:
        patch.setattr(owner, call, fail(FULL))
        write_text(target, "new")
    assert str(failed.value) == f"cannot write {target}: No space left on device"
    assert failed.value.exit_code == 1
    assert target.read_text() == "old"
    assert only(tmp_path) == ["a.txt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "a.txt", tmp_path):
        with pytest.raises(RunFailedError, match="cannot write"):
            write_text(target, "x")
    assert only(tmp_path) == ["file"]


def test_json_is_strict(tmp_path):
    target = tmp_path / "a.json"
    value = {"ü": [1, 2.5, None, True], "b": {"c": "\u2028"}}
    write_json(target, value)
    assert json.loads(target.read_text(encoding="utf-8")) == value
    assert "ü" in target.read_text(encoding="utf-8")
    for number in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(RunFailedError, match=r"a\.json: a number in it is not finite"):
            write_json(target, {"x": [number]})
    assert json.loads(target.read_text(encoding="utf-8")) == value


def test_what_a_kill_left_of_a_file_is_known_by_its_name(tmp_path):
    """A process that is killed cleans nothing up: here it is what it wrote beside its targets."""
    left = []
    for name in ("a.txt", "b"):
        with pytest.raises(ValueError), atomic_path(tmp_path / name) as scratch:
            left.append(scratch.name)
            raise ValueError
    for name in left:
        (tmp_path / name).write_text("half")
    scratch_folder(tmp_path / "adapter").mkdir()
    (scratch_folder(tmp_path / "adapter") / "weights").write_text("half")
    (tmp_path / ".link.partial").symlink_to(tmp_path / "kept", target_is_directory=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".x.partial").write_text("")
    for name in ("mine.partial", ".mine", "a.txt"):
        (tmp_path / name).write_text("")
    remove_scratch(tmp_path)
    assert only(tmp_path) == [".mine", "a.txt", "kept", "mine.partial"]
    assert only(tmp_path / "kept") == [".x.partial"]
    remove_scratch(tmp_path / "missing")


def test_every_folder_that_is_made_is_synced_in_the_one_that_holds_it(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr("swlora.files.sync_path", synced.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "a", exist_ok=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")
