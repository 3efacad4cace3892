"""Locks on files and folders: alone or shared, and gone with their process."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swlora.errors import UserError
from swlora.locks import Lock, is_abandoned, is_locked, lock, lock_folder

HOLDER = """
import sys
from pathlib import Path
from swlora.locks import lock
held = lock(Path(sys.argv[1]), alone=sys.argv[2] == "alone")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("theirs", ["alone", "shared"])
def test_a_lock_of_another_process(theirs: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), theirs]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == "held\n"
        assert lock(tmp_path, alone=True) is None
        shared = lock(tmp_path, alone=False)
        assert (shared is None) == is_locked(tmp_path) == (theirs == "alone")
        assert is_abandoned(tmp_path) == (theirs == "shared")
        if shared:
            shared.release()
        with pytest.raises(UserError, match=f"another process is at work in {tmp_path}"):
            lock_folder(tmp_path)
        holder.kill()
    assert not is_locked(tmp_path) and not is_locked(tmp_path / "missing")
    assert is_abandoned(tmp_path) and not is_abandoned(tmp_path / "missing")
    lock_folder(tmp_path).release()


def test_a_lock_ends_with_its_block_or_its_release(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    assert lock(tmp_path, alone=False) is None
    held.release()
    held.release()
    with pytest.raises(ValueError, match="x"), lock_folder(tmp_path):
        raise ValueError("x")
    lock_folder(tmp_path).release()


def test_a_missing_file_is_made_where_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "lock", alone=False)
    held = lock(tmp_path / "lock", alone=False, wait=True, make=True)
    assert held and (tmp_path / "lock").exists()
    held.release()


def test_what_was_locked_is_told_from_what_took_its_place(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with lock_folder(place) as held:
        assert held.is_of(place)
        place.rename(tmp_path / "elsewhere")
        assert not held.is_of(place)
        place.mkdir()
        assert not held.is_of(place)
        assert held.is_of(tmp_path / "elsewhere")


def test_without_locks_everything_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    first, second = lock_folder(tmp_path), lock_folder(tmp_path)
    assert first.is_of(tmp_path) and not first.is_of(tmp_path / "missing")
    first.release(), second.release()
    assert Lock(None).is_of(tmp_path)
    assert not is_abandoned(tmp_path)  # as far as one can know


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with lock_folder(tmp_path) as held:
        assert held.is_held and not held.keeps_out
        assert not is_abandoned(tmp_path) and not is_locked(tmp_path)


def test_who_only_looks_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = lock(tmp_path, alone=False)
    assert looking
    monkeypatch.setattr("swlora.locks.time.sleep", lambda _: looking.release())
    lock_folder(tmp_path).release()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    held = lock(tmp_path / "pipe", alone=False)
    assert held
    held.release()
