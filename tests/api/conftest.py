"""What the tests of Python's functions call them with."""

from typing import Any

import pytest
from tests.support.data_files import write_rows
from tests.support.small_runs import ROWS
from tests.support.whole_jobs import DEV


@pytest.fixture
def settings(model_folder, tmp_path, monkeypatch, no_java) -> dict[str, Any]:
    """Keyword arguments of a small training; the working directory is an empty one."""
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return {
        "model": str(model_folder("llama")),
        "dtype": "float32",
        "device": "cpu",
        "dataset": write_rows(tmp_path / "train.jsonl", ROWS),
        "eval_file": write_rows(tmp_path / "dev.jsonl", DEV),
    }
