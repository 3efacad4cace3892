"""A kill or a power cut between any two file operations of a training loses nothing."""

from pathlib import Path

import pytest
from tests.support.fault_trials import write_inputs
from tests.support.kill_points import check_kill_points

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("fresh_cache")]


def test_every_point_between_file_operations_leaves_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swlora.evaluation.loss_curve.draw_loss", lambda *_: None)
    # With one checkpoint kept, the last one also replaces the one before it
    changes = {"train.eval_every_steps": 1, "train.max_steps": 2, "train.keep_checkpoints": 1}
    found = check_kill_points(write_inputs(tmp_path) | changes, tmp_path)
    assert found.failures == []
    assert found.n_points > 150
