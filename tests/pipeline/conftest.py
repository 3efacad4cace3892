"""What the tests of the pipeline share: no Java, and files with rows."""

from pathlib import Path

import pytest
from tests.support.whole_jobs import DEV, TRAIN, write_rows

from swlora.evaluation import scores as official


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Java takes ten seconds to say what tests of the metrics say anyway."""
    monkeypatch.setattr(official, "missing_java", lambda: "Java is left out here")


@pytest.fixture
def rows(tmp_path) -> tuple[Path, Path]:
    return write_rows(tmp_path / "train.jsonl", TRAIN), write_rows(tmp_path / "dev.jsonl", DEV)
