"""The command as a test runs it, and a short run of it."""

from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support.data_files import write_rows

from swlora.cli import main

NOTES = ("data: ", "model: ", "warning: ")
ROWS = [{"prompt": f"p{k // 2}", "completion": f"answer {k}."} for k in range(8)]


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The one line that a mistake is."""
        assert self.code == 2, self
        assert self.out == ""
        (line,) = [s for s in self.err.splitlines() if not s.startswith(NOTES)]
        assert line.startswith("swlora: ")
        return line.removeprefix("swlora: ")


@pytest.fixture
def swlora(capsys, tmp_path, monkeypatch, no_java):
    """A function that runs the command in a folder of its own, without Java and the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SWLORA_E2E", raising=False)

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        else:
            code = 0
        return Done(int(code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def model(model_folder) -> str:
    return str(model_folder("llama"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no Hub, whether or not one could be reached."""
    monkeypatch.setattr("swlora.models.load.hub_reachable", lambda: False)


@pytest.fixture
def small(model_folder, rows) -> list[object]:
    """Flags of a short run."""
    return [
        *("--model", model_folder("llama"), "--dtype", "float32", "--dataset", rows),
        *("--rank", 2, "--max-steps", 2, "--batch-size", 3),
    ]
