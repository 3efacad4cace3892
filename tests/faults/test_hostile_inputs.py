"""What cannot be a model, an adapter, data, a configuration or a run is one line, at once."""

from pathlib import Path

import pytest
from tests.support.hostile_inputs import prepare_inputs, try_inputs

pytestmark = pytest.mark.faults


def test_hostile_inputs_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "hostile").mkdir()
    tried = try_inputs(prepare_inputs(tmp_path), tmp_path / "hostile", every=12)
    assert [one.wrong for one in tried if one.wrong] == []
    assert len(tried) > 10
