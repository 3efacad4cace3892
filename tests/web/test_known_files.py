"""Files under --runs are read once, and again when they have changed."""

import errno
import json
import os
from pathlib import Path

import pytest

from swlora.errors import UserError
from swlora.web import folders
from swlora.web.folders import RunEntry, RunFolders, known_run, run_result
from swlora.web.known_files import KnownFiles


def write(path: Path, **facts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name("scratch")
    scratch.write_text(json.dumps({"status": "done", "command": "train"} | facts))
    os.replace(scratch, path)


@pytest.fixture
def n_read(monkeypatch) -> list[str]:
    """The names of the folders whose run.json was read."""
    plain, read = folders.read_run, []

    def noted(folder: Path):
        read.append(folder.name)
        return plain(folder)

    monkeypatch.setattr(folders, "read_run", noted)
    monkeypatch.setattr(folders, "FRESH_S", 0.0)
    return read


def test_a_walk_reads_what_has_changed(tmp_path, n_read):
    for name in "abc":
        write(tmp_path / name / "run.json")
    (tmp_path / "c/run.json").write_text("[1, 2]")
    walked = RunFolders(tmp_path)
    assert list(walked.runs()) == ["a", "b"] and sorted(n_read) == ["a", "b", "c"]
    for _ in range(3):
        assert list(walked.runs()) == ["a", "b"]
        assert walked.unreadable()["c"].endswith("it holds no JSON object")
        assert known_run(tmp_path / "a")["status"] == "done"
    assert len(n_read) == 3
    write(tmp_path / "a/run.json", status="late")  # of the same length
    write(tmp_path / "c/run.json")
    assert list(walked.runs()) == ["a", "b", "c"]
    assert known_run(tmp_path / "a")["status"] == "late"
    assert sorted(n_read) == ["a", "a", "b", "c", "c"]
    (tmp_path / "b/run.json").unlink()
    assert list(walked.runs()) == ["a", "c"]
    with pytest.raises(UserError):
        known_run(tmp_path / "b")


def test_a_result_is_read_again_when_it_is_another(tmp_path, monkeypatch):
    entry = RunEntry("a", tmp_path / "a")
    write(tmp_path / "a/run.json")
    assert run_result(entry) == {}
    for loss in (1.5, 2.5):
        write(tmp_path / "a/result.json", loss=loss)
        assert run_result(entry)["loss"] == loss
        with monkeypatch.context() as patched:
            patched.setattr(folders, "read_json_object", None)
            assert run_result(entry)["loss"] == loss


def test_what_only_the_system_refused_is_asked_for_again(tmp_path, monkeypatch):
    write(tmp_path / "a/run.json")

    def refuse(*_arguments):
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("swlora.bounded_read.os.open", refuse)
        with pytest.raises(UserError, match="too many open files"):
            known_run(tmp_path / "a")
    assert known_run(tmp_path / "a")["status"] == "done"


def test_a_file_that_became_a_link_is_not_read(tmp_path):
    write(tmp_path / "a/run.json")
    assert known_run(tmp_path / "a")["status"] == "done"
    (tmp_path / "a/run.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "a/run.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="it is a link"):
        known_run(tmp_path / "a")


def test_what_was_asked_for_last_is_kept_as_far_as_there_is_room(tmp_path):
    known, read = KnownFiles(max_bytes=25), []
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(bytes(10))

    def ask(path: Path) -> str:
        return known.read(path, lambda: read.append(path.name) or path.name)

    assert [ask(path) for path in (*paths[:2], paths[0], *paths[2:])] == ["a", "b", "a", "c"]
    assert read == ["a", "b", "c"]
    assert ask(paths[0]) == "a" and read == ["a", "b", "c"]
    assert ask(paths[1]) == "b" and read == ["a", "b", "c", "b"]
    (tmp_path / "large").write_bytes(bytes(30))  # more than all that is kept
    assert ask(tmp_path / "large") == "large" and ask(paths[0]) == "a"
    assert read[4:] == ["large", "a"]
