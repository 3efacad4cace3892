"""Flipped bits and cut files: noticed in one line, said, or without effect."""

from pathlib import Path

import pytest
from tests.support.damage import damage_all
from tests.support.fault_trials import write_inputs

pytestmark = pytest.mark.faults


def test_damage_to_any_file_is_noticed_or_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swlora.evaluation.loss_curve.draw_loss", lambda *_: None)
    found = damage_all(write_inputs(tmp_path), tmp_path, n_flips=2, n_cuts=1)
    assert found.failures == []
    assert found.n > 40
