"""A training holds no more files and threads at its end than after a tenth of its steps."""

from pathlib import Path

import pytest
from tests.support.fault_trials import write_inputs
from tests.support.long_runs import held_in_training

pytestmark = pytest.mark.faults


def test_files_and_threads_stay_as_many(tmp_path: Path) -> None:
    held = held_in_training(write_inputs(tmp_path), tmp_path, n_steps=60)
    assert [one.step for one in held] == [6 * k for k in range(1, 11)]
    assert held[-1].files <= held[0].files and held[-1].threads <= held[0].threads
