"""How many cores this process can keep busy."""

import os

import pytest
from tests.support.control_groups import lay_groups

from swlora import cores


@pytest.mark.parametrize(("quota", "n"), [("max", 6), ("250000", 3), ("6400000", 6)])
def test_cores_that_a_container_has_no_cpu_time_for_do_not_count(quota, n, tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "allowed_cores", lambda: set(range(6)))
    lay_groups(monkeypatch, tmp_path, "0::/pod", {"pod/cpu.max": f"{quota} 100000"})
    assert cores.n_usable_cores() == n


def test_the_cores_that_this_process_may_run_on():
    allowed = cores.allowed_cores()
    assert allowed and allowed <= set(range(os.cpu_count() or 1))
