"""`swlora cache` as a person uses it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swlora.cli import main
from swlora.cli.disk import ago, say_what_is_left, size


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a model and the states of one training, 2 MB, unused for eight days."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SWLORA_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    (folder / "smollm2").mkdir(parents=True)
    (folder / "smollm2" / "config.json").write_text("{}")
    states = folder / "prefix" / "key"
    states.mkdir(parents=True)
    (states / "states").write_bytes(bytes(2_000_000))
    long_ago_s = time.time() - 8 * 86_400
    (states / "about.json").write_text(json.dumps({"for": "tiny", "made_at": long_ago_s}))
    os.utime(states, (long_ago_s, long_ago_s))
    return folder


def swlora(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        main(["cache", *arguments])
    except SystemExit as end:
        return (int(end.code or 0), *capsys.readouterr())
    return (0, *capsys.readouterr())


def test_the_cache_is_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = swlora(capsys, "--json", "c.json")
    head, columns, model, states = out.splitlines()
    assert (code, err) == (0, "")
    assert head == f"{root}: 2 entries, 2.0 MB"
    assert columns.split() == ["kind", "size", "made", "last", "use", "for"]
    assert model.split()[0] == "model"
    assert model.endswith("just now  just now  smollm2")
    assert states.split() == ["prefix", "2.0", "MB", "8", "d", "ago", "8", "d", "ago", "tiny"]
    result = json.loads(Path("c.json").read_text())
    assert (result["folder"], result["freed_bytes"], result["cleared"]) == (str(root), 0, [])
    assert [e["kind"] for e in result["entries"]] == ["model", "prefix"]
    assert result["entries"][1]["path"] == str(root / "prefix" / "key")


def test_it_is_cleared_by_kind_and_age(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--clear", "prefix", "--older-than", "9d", "--yes"]
    assert swlora(capsys, *flags)[1].splitlines()[-1] == "nothing to clear"
    flags[3] = "7d"
    code, out, _ = swlora(capsys, *flags, "--json", "c.json")
    assert (code, out.splitlines()[-1]) == (0, "removed 1 entry, 2.0 MB")
    result = json.loads(Path("c.json").read_text())
    assert result["cleared"] == [str(root / "prefix" / "key")]
    assert result["freed_bytes"] >= 2_000_000
    assert [path.name for path in root.iterdir() if any(path.iterdir())] == ["smollm2"]


def test_a_person_is_asked(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = swlora(capsys, "--clear", "all")
    assert code == 2
    assert err == "swlora: nobody can be asked here; --yes clears without a question\n"
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    asked: list[str] = []

    def answer(said: bool):
        return lambda text, **_: asked.append(text) or said

    monkeypatch.setattr("typer.confirm", answer(False))
    assert swlora(capsys, "--clear", "all")[1].endswith("nothing was removed\n")
    assert (root / "prefix" / "key" / "states").exists()
    monkeypatch.setattr("typer.confirm", answer(True))
    assert "removed 2 entries, 2.0 MB\n" in swlora(capsys, "--clear", "all")[1]
    assert asked == ["remove 2 entries, 2.0 MB?"] * 2
    assert swlora(capsys)[1] == f"{root}: 0 entries, 0 bytes\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--yes"], "--yes goes with --clear"),
        (["--clear", "models"], "no kind of cache is called 'models'"),
        (["--older-than", "week"], "'week' is no age"),
    ],
)
def test_mistakes(
    flags: list[str], said: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = swlora(capsys, *flags)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err


def test_torch_is_not_imported(root: Path) -> None:
    code = (
        "import sys\nfrom swlora.cli import main\n"
        "try:\n    main(['cache'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout[: len(str(root))]) == (0, str(root))


def test_what_a_run_left_is_said_where_it_is_much(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").write_bytes(bytes(1_000_000))
    since_s = time.time() - 60
    say_what_is_left(run, since_s)
    assert capsys.readouterr().err == ""
    (run / "model").write_bytes(bytes(20_000_000))
    say_what_is_left(run, since_s)
    assert capsys.readouterr().err.startswith(f"on the disk: 21 MB in {run}, 4.1 KB in the cache")
    os.utime(root / "prefix" / "key")
    say_what_is_left(run, since_s)
    assert capsys.readouterr() == (
        "",
        f"on the disk: 21 MB in {run}, 2.0 MB in the cache (swlora cache lists and clears it)\n",
    )


def test_sizes_and_ages() -> None:
    sizes = [0, 999, 4096, 12_345, 2_400_000, 812_000_000, 8_500_000_000]
    said = ["0 bytes", "999 bytes", "4.1 KB", "12 KB", "2.4 MB", "812 MB", "8.5 GB"]
    assert [size(n) for n in sizes] == said
    ages = [0, 59, 60, 3599, 7200, 5 * 86_400]
    assert [ago(s) for s in ages] == [
        *("just now", "just now", "1 min ago", "60 min ago", "2 h ago", "5 d ago")
    ]
