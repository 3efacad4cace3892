"""What the tests of the pipeline share: no Java, no drawings, and files with rows."""

from pathlib import Path

import pytest
from tests.support.data_files import write_rows
from tests.support.small_runs import ROWS, write_data
from tests.support.whole_jobs import DEV


@pytest.fixture(autouse=True)
def without_java(no_java: None) -> None:
    """No test of the pipeline waits for Java."""


@pytest.fixture
def no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out loss.png, which takes as long as the training of a tiny model."""
    monkeypatch.setattr("swlora.evaluation.loss_curve.draw_loss", lambda *_: None)


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Path, Path]:
    return write_rows(tmp_path / "train.jsonl", ROWS), write_rows(tmp_path / "dev.jsonl", DEV)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    return write_data(tmp_path)
