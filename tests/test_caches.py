"""What lies in the cache folder, and that nothing in use is ever removed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swlora import caches
from swlora.caches import (
    clear,
    disk_bytes,
    entries,
    hold,
    left_by_run,
    parse_age,
    parse_kinds,
    remove,
    select,
)
from swlora.errors import UserError

DAY_S = 86_400


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(path: Path, content: str | bytes = "x", *, used_ago_s: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    for each in (path, path.parent):
        os.utime(each, (time.time() - used_ago_s,) * 2)
    return path


def filled(root: Path) -> None:
    """One entry of every kind, the model unused for ten days, the states for three."""
    put(root / "smollm2" / "config.json", used_ago_s=10 * DAY_S)
    put(root / "prefix" / "key" / "states", bytes(100_000))
    said = json.dumps({"for": "tiny: 9 tokens", "made_at": time.time() - 5 * DAY_S})
    put(root / "prefix" / "key" / "about.json", said, used_ago_s=3 * DAY_S)
    put(root / "english" / "key.json", json.dumps({"for": "a tiny model", "made_at": 5.0}))
    put(root / ".unpacking-x" / "half", used_ago_s=DAY_S)
    put(root / "my-notes.txt")


def test_everything_is_listed_by_its_kind(root: Path) -> None:
    assert entries() == []  # no folder at all
    filled(root)
    found = {entry.kind: entry for entry in entries()}
    assert [entry.kind for entry in entries()] == list(caches.KINDS)
    owners = {kind: entry.owner for kind, entry in found.items()}
    assert owners == {
        "model": "smollm2",
        "prefix": "tiny: 9 tokens",
        "english": "a tiny model",
        "scratch": ".unpacking-x",
        "other": "my-notes.txt",
    }
    states = found["prefix"]
    assert states.path == root / "prefix" / "key"
    assert states.n_bytes == disk_bytes(states.path) >= 100_000
    assert time.time() - states.used_at == pytest.approx(3 * DAY_S, abs=60)
    assert time.time() - states.made_at == pytest.approx(5 * DAY_S, abs=60)
    assert found["english"].made_at == 5
    assert time.time() - found["model"].made_at == pytest.approx(10 * DAY_S, abs=60)
    assert not any(entry.in_use for entry in found.values())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"for": "x", "made_at": "soon"}', "\xff"])
def test_an_entry_that_says_nothing_of_itself_is_listed_all_the_same(
    content: str, root: Path
) -> None:
    put(root / "prefix" / "key" / "about.json", content.encode("latin-1"), used_ago_s=99)
    (entry,) = entries()
    assert (entry.owner, entry.kind) == ("key", "prefix")
    assert time.time() - entry.made_at == pytest.approx(99, abs=5)


def test_what_is_chosen_goes_and_nothing_else(root: Path) -> None:
    filled(root)
    assert select(entries(), ("prefix",), 4 * DAY_S) == []
    chosen = select(entries(), parse_kinds("all"), 2 * DAY_S)
    assert [entry.kind for entry in chosen] == ["model", "prefix"]
    assert clear(chosen) == chosen
    assert [entry.kind for entry in entries()] == ["english", "scratch", "other"]
    clear(select(entries(), parse_kinds("all"), 0))
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["my-notes.txt"]
    clear(select(entries(), parse_kinds("other"), 0))
    assert entries() == []


HOLDER = """
import fcntl, os, sys
from pathlib import Path
from swlora.caches import hold
what, path = sys.argv[1], Path(sys.argv[2])
if what == "model":
    assert hold(path)
else:
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["model", "prefix"])
def test_what_another_process_has_in_use_stays(kind: str, root: Path) -> None:
    filled(root)
    path = root / "smollm2" if kind == "model" else root / "prefix" / "key"
    before = sorted(path.rglob("*"))
    command = [sys.executable, "-c", HOLDER, kind, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == "held\n"
        (entry,) = (e for e in entries() if e.kind == kind)
        assert entry.in_use
        assert clear([entry]) == []
        assert not remove(kind, path)  # also where it came into use after it was listed
        assert set(before) <= set(path.rglob("*"))
        holder.stdin.close()
        holder.wait()
    (entry,) = (e for e in entries() if e.kind == kind)
    assert (entry.in_use, clear([entry]), path.exists()) == (False, [entry], False)


def test_a_model_in_use_says_when_it_was_used_last(root: Path) -> None:
    folder = put(root / "smollm2" / "config.json", used_ago_s=10 * DAY_S).parent
    assert hold(folder)
    assert hold(folder)
    (entry,) = entries()
    assert entry.in_use
    assert time.time() - entry.used_at < 60
    assert time.time() - entry.made_at == pytest.approx(10 * DAY_S, abs=60)
    assert not hold(root / "gone")


def test_links_are_removed_and_what_they_lead_to_stays(root: Path, tmp_path: Path) -> None:
    real = put(tmp_path / "elsewhere" / "config.json", bytes(100_000)).parent
    root.mkdir()
    (root / "linked").symlink_to(real)
    (entry,) = entries()
    assert (entry.kind, entry.n_bytes < 10_000) == ("model", True)
    assert clear([entry]) == [entry]
    assert not (root / "linked").is_symlink()
    assert (real / "config.json").exists()


def test_young_scratch_may_be_at_work(root: Path) -> None:
    put(root / ".unpacking-x" / "half")
    (entry,) = entries()
    assert entry.in_use
    assert clear([entry]) == []
    assert entry.path.exists()


def test_what_a_run_has_left(root: Path, tmp_path: Path) -> None:
    filled(root)
    run = put(tmp_path / "run" / "sub" / "file", bytes(50_000)).parents[1]
    now_s = time.time()
    states, model = disk_bytes(root / "prefix" / "key"), disk_bytes(root / "smollm2")
    assert left_by_run(run, now_s - 4 * DAY_S) == (disk_bytes(run), states)
    assert left_by_run(run, now_s - 11 * DAY_S)[1] - states >= model  # made in that time
    assert left_by_run(run, now_s + 60) == (disk_bytes(run), 0)


@pytest.mark.parametrize(
    ("text", "age_s"), [("90m", 5400), ("12h", 43_200), ("7d", 7 * DAY_S), ("1.5w", 10.5 * DAY_S)]
)
def test_ages(text: str, age_s: float) -> None:
    assert parse_age(text) == age_s


@pytest.mark.parametrize("text", ["", "7", "d", "7 days", "-1d", "nand", "infd"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(UserError, match="is no age; write one such as 90m, 12h, 7d or 2w"):
        parse_age(text)


def test_kinds() -> None:
    assert parse_kinds("prefix, english") == ("prefix", "english")
    assert "other" not in parse_kinds("all")  # swlora did not make it
    with pytest.raises(UserError, match="no kind of cache is called 'prefixes'; take all or some"):
        parse_kinds("prefixes")
