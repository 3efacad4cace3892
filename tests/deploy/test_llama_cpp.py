"""Finding llama.cpp, and what is said where it fails. What it computes is tested by the exports."""

import json
import stat
from pathlib import Path

import gguf
import pytest

from swlora.deploy.llama_cpp import VARIABLE, LlamaCpp, Question, ask, find_llama_cpp
from swlora.errors import RunFailedError, UserError


@pytest.fixture
def fake_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `node` on the path that prints the file `said` beside it whatever it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    node = folder / "node"
    node.write_text('#!/bin/sh\ncat "$(dirname "$0")/said"\n')
    node.with_name("said").write_text("v20.1.0\n")
    node.chmod(node.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv(VARIABLE, raising=False)
    return node


def install(folder: Path, version: str = "3.21.1") -> Path:
    package = folder / "node_modules" / "node-llama-cpp"
    (package / "dist").mkdir(parents=True)
    (package / "dist" / "index.js").touch()
    (package / "package.json").write_text(json.dumps({"version": version}))
    return package


def empty_gguf(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return folder / "x.gguf"


def test_it_is_found_where_it_was_named_or_above_the_current_folder(
    fake_node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = tmp_path / "project" / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert find_llama_cpp() is None
    cached = install(tmp_path / "project" / ".cache" / "llama-cpp")
    assert find_llama_cpp() == LlamaCpp(fake_node, cached, "3.21.1")
    nearer = install(tmp_path / "project" / "a", "4.0")
    assert find_llama_cpp() == LlamaCpp(fake_node, nearer, "4.0")
    other = install(tmp_path / "other")
    for place in (other, other.parent, other.parent.parent):
        found = find_llama_cpp(place)
        assert found is not None and found.package == other
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other"))
    found = find_llama_cpp()
    assert found is not None and found.package == other


def test_a_place_that_holds_none_is_refused(
    fake_node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^--llama-cpp: \S+ holds no node-llama-cpp; `npm install"):
        find_llama_cpp(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=rf"^{VARIABLE}: "):
        find_llama_cpp()
    (install(tmp_path) / "package.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        find_llama_cpp()


def test_without_a_new_node_a_place_that_was_named_is_refused_and_no_other_is_found(
    fake_node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path)
    monkeypatch.chdir(tmp_path)
    fake_node.with_name("said").write_text("v18.20.8\n")  # too old
    for path in (str(fake_node.parent), ""):
        monkeypatch.setenv("PATH", path, prepend=":" if path else None)
        with pytest.raises(UserError, match=r"Node\.js 20 or newer"):
            find_llama_cpp(tmp_path)
        assert find_llama_cpp() is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Segmentation fault", "^llama.cpp broke off on x.gguf with code 0: it said nothing$"),
        ('{"error": "two\\nlines"}', r"^llama.cpp \(node-llama-cpp 3\) on x.gguf: two lines$"),
    ],
)
def test_what_llama_cpp_fails_with_is_one_line(
    fake_node: Path, tmp_path: Path, said: str, expected: str
) -> None:
    fake_node.with_name("said").write_text(said)
    with pytest.raises(RunFailedError, match=expected):
        ask(LlamaCpp(fake_node, install(tmp_path), "3"), Question(empty_gguf(tmp_path)))


def test_a_process_that_does_not_end_is_ended(fake_node: Path, tmp_path: Path) -> None:
    fake_node.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(RunFailedError, match=r"not done with x.gguf in 0 s"):
        ask(LlamaCpp(fake_node, tmp_path, "3"), Question(empty_gguf(tmp_path)), timeout_s=0.2)


def test_a_damaged_file_never_gets_to_llama_cpp(fake_node: Path, tmp_path: Path) -> None:
    fake_node.write_text("#!/bin/sh\nexec sleep 60\n")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match="cannot be read as a GGUF"):
        ask(LlamaCpp(fake_node, tmp_path, "3"), Question(path))
