"""Strange requests, clients that leave, slow clients: nothing is left of them."""

from pathlib import Path

import pytest
from tests.support.fault_trials import write_inputs
from tests.support.strained_server import QUICK, strain

pytestmark = [pytest.mark.faults, pytest.mark.allow_hosts(["127.0.0.1", "127.0.0.2"])]


def test_nothing_is_left_of_strange_requests_and_bad_clients(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    found = strain(tmp_path / "model", tmp_path / "runs", QUICK)
    assert found.failures == []
    assert found.n == QUICK.strange + QUICK.leaving + QUICK.slow
    assert found.statuses[200] > 5 and found.statuses[400] > 50
    assert found.texts_left > QUICK.leaving // 2
    assert found.most_connections == QUICK.slow
