"""Which rows the arms run that train with a Trainer, and in which order."""

from dataclasses import replace

from benchmarks.arms import SCENARIO_ARMS
from benchmarks.trainer_steps import picked_rows

LENGTHS = [5, 9, 7, 3, 8, 4, 6, 2]


def test_the_longest_batch_warms_up_and_the_others_stand_for_all() -> None:
    arm = replace(SCENARIO_ARMS["peft"], batch=2)
    assert picked_rows(arm, LENGTHS, 4) == [1, 4, 2, 6, 3, 7]


def test_a_compiled_arm_runs_every_timed_batch_once_before() -> None:
    arm = replace(SCENARIO_ARMS["unsloth-compiled"], batch=2)
    timed = [2, 6, 3, 7]
    assert picked_rows(arm, LENGTHS, 4) == [1, 4, *timed, *timed]
