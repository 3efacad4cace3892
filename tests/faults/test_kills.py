"""SIGKILL at a random moment of a real process; resumed, it comes to the same bytes."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.fault_trials import write_inputs
from tests.support.kills import CASES, kill_and_resume, prepare_case

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", list(CASES))
def test_a_killed_process_resumes_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    case = prepare_case(name, write_inputs(tmp_path), tmp_path / "whole")
    for number in range(9):  # until one is still at work when its time has come
        folder = tmp_path / f"killed-{number}"
        folder.mkdir()
        drawn = random.Random(f"{name} {number}")
        n_killed, difference = kill_and_resume(case, folder, tmp_path / "cache", drawn)
        assert difference is None
        if n_killed:
            return
    raise AssertionError("nothing was killed")


def test_two_processes_share_a_prefix_cache_while_they_are_killed(tmp_path: Path) -> None:
    case = prepare_case("lora", write_inputs(tmp_path), tmp_path / "whole")

    def killed(number: int) -> tuple[int, str | None]:
        folder = tmp_path / f"killed-{number}"
        folder.mkdir()
        return kill_and_resume(case, folder, tmp_path / "cache", random.Random(number), n_kills=2)

    with ThreadPoolExecutor(2) as both:
        for _, difference in both.map(killed, (1, 2)):
            assert difference is None
