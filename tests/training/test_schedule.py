"""The schedule: rates by hand; every epoch planned once, when it begins, and resumed anywhere."""

import math
from typing import get_args

import numpy as np
import pytest

from swlora.config import TrainSpec
from swlora.data.steps import StepOrder, plan_steps
from swlora.data.token_sequences import TokenSequences
from swlora.errors import RunFailedError
from swlora.training.schedule import Schedule, begun_epochs, data_note, fitted, learning_rate


def spec(**changes) -> TrainSpec:
    return TrainSpec(**{"epochs": 2, "learning_rate": 0.1, "warmup_fraction": 0.2} | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "linear", "warmup_fraction": 0}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "warmup_fraction": 0.4}, [0.5, 1, 1, 2 / 3, 1 / 3]),
        ({"schedule": "constant", "warmup_fraction": 0.4}, [0.5, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_fraction": 0.09}, [1, 1, 1, 1, 1]),
        (
            {"schedule": "cosine", "warmup_fraction": 0.2},
            [1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)],
        ),
    ],
)
def test_learning_rates_by_hand(changes, expected):
    train_spec = spec(learning_rate=3.0, **changes)
    rates = [learning_rate(train_spec, step, 5) for step in range(5)]
    assert rates == pytest.approx([3 * e for e in expected], rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("n_steps", [1, 2, 17])
def test_every_step_has_a_positive_rate_of_at_most_the_given_one(schedule, n_steps):
    for warmup_fraction in (0, 0.05, 0.5, 0.99):
        train_spec = spec(schedule=schedule, warmup_fraction=warmup_fraction)
        rates = [learning_rate(train_spec, step, n_steps) for step in range(n_steps)]
        assert all(0 < rate <= 0.1 for rate in rates)
        assert max(rates) == 0.1 or warmup_fraction == 0.99


class CountedPlan:
    """Three steps an epoch, named by epoch and number; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, epoch: int) -> list[list[np.ndarray]]:
        self.asked.append(epoch)
        return [[np.array([10 * epoch + k])] for k in range(3)]


def ids(steps) -> list[int]:
    return [int(rows[0][0]) for rows in steps]


ALL = [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]


@pytest.mark.parametrize("n_done", range(13))
@pytest.mark.parametrize("max_steps", [None, 1, 3, 7, 9, 99])
def test_the_steps_that_are_left(n_done, max_steps):
    plan = CountedPlan()
    schedule = Schedule(spec(epochs=4, max_steps=max_steps), plan, 3)
    assert schedule.n_steps == min(12, max_steps or 12)
    left = ALL[n_done : schedule.n_steps]
    assert ids(schedule.steps(n_done)) == left
    assert plan.asked == sorted({i // 10 for i in left})  # each once, and no other


def test_an_epoch_is_planned_when_it_begins():
    plan = CountedPlan()
    steps = Schedule(spec(), plan, 3).steps()
    assert plan.asked == []
    assert ids([next(steps), next(steps), next(steps)]) == [0, 1, 2]
    assert plan.asked == [0]
    assert ids(steps) == [10, 11, 12]
    assert plan.asked == [0, 1]


def test_an_epoch_of_another_length_is_refused():
    steps = Schedule(spec(), lambda epoch: [[np.array([0])]] * (3 - epoch), 3).steps()
    assert len([next(steps) for _ in range(3)]) == 3
    with pytest.raises(RunFailedError, match="epoch 1 has 2 steps and not 3"):
        next(steps)


@pytest.mark.parametrize("order", get_args(StepOrder))
@pytest.mark.parametrize("batch_size", [1, 4, 5, 13, 14])
def test_the_schedule_of_sequences_is_that_of_plan_steps(order, batch_size):
    sequences = TokenSequences.from_lists([([5, i % 4], [i, 0]) for i in range(13)])
    train_spec = spec(batch_size=batch_size, order=order, epochs=3)
    schedule = Schedule.of(sequences, train_spec, seed=7)
    limits = {"sequences_per_step": batch_size, "max_tokens_per_tree": train_spec.row_tokens}
    plans = [
        plan_steps(sequences, order=order, seed=7, epoch=epoch, **limits) for epoch in range(3)
    ]
    expected = [step for steps in plans for step in steps]
    found = list(schedule.steps())
    assert len(found) == len(expected) == schedule.n_steps
    for ours, theirs in zip(found, expected, strict=True):
        assert [row.tolist() for row in ours] == [row.tolist() for row in theirs]


# Few rows


@pytest.mark.parametrize(
    ("n_rows", "changes", "epochs", "size", "n_steps"),
    [
        (1, {}, 3, 1, 3),
        (12, {}, 3, 1, 36),  # 2 rows a step make 18 steps
        (57, {}, 3, 9, 21),
        (60, {}, 3, 9, 21),
        (608, {}, 3, 16, 114),
        (1999, {}, 3, 16, 375),
        (2000, {}, 1, 16, 125),
        (300, {"epochs": 1}, 1, 15, 20),
        (60, {"epochs": 1}, 1, 3, 20),
        (48, {"epochs": 5}, 5, 15, 20),
        (60, {"max_steps": 5}, 3, 16, 5),
        (60, {"max_steps": 5, "epochs": 1}, 1, 14, 5),
        (60, {"batch_size": 32}, 3, 32, 6),
        (2000, {"batch_size": 1}, 1, 1, 2000),
    ],
)
def test_few_rows_get_passes_and_a_batch_that_make_enough_steps(
    n_rows, changes, epochs, size, n_steps
):
    train_spec = TrainSpec(**changes)
    own = fitted(train_spec, n_rows)
    assert (own.epochs, own.batch_size) == (epochs, size)
    sequences = TokenSequences.from_lists([([5, i], [i, 0]) for i in range(n_rows)])
    schedule = Schedule.of(sequences, train_spec, seed=0)
    assert schedule.n_steps == n_steps and schedule.spec == own
    assert (
        schedule.n_epochs
        == begun_epochs(train_spec, n_rows)
        == math.ceil(n_steps / math.ceil(n_rows / size))
    )
    assert len(list(schedule.steps())) == n_steps


@pytest.mark.parametrize("n_rows", range(1, 700, 7))
@pytest.mark.parametrize("epochs", [1, 2, 3, 20])
def test_the_batch_is_the_largest_one_that_does(n_rows, epochs):
    size = fitted(TrainSpec(epochs=epochs), n_rows).batch_size
    assert 1 <= size <= 16
    assert size == 1 or epochs * math.ceil(n_rows / size) >= 20
    assert size == 16 or epochs * math.ceil(n_rows / (size + 1)) < 20


@pytest.mark.parametrize(
    ("n_rows", "changes", "said"),
    [
        (57, {}, "few data (57 rows): 3 epochs, 9 rows a step, 21 steps in all (--epochs and"),
        (1999, {}, "few data (1,999 rows): 3 epochs, 375 steps in all (--epochs sets another"),
        (57, {"epochs": 1}, "few data (57 rows): 2 rows a step, 29 steps in all (--batch-size s"),
        (600, {"max_steps": 90}, "few data (600 rows): 3 epochs, 90 steps in all (--epochs sets"),
        (600, {"max_steps": 19}, None),
        (57, {"batch_size": 32, "epochs": 1}, "57 rows make only 2 steps of 32 rows; more --e"),
        (20, {"batch_size": 20, "epochs": 1}, "20 rows make only 1 step of 20 rows; more --ep"),
        (12, {"batch_size": 1, "epochs": 1}, "12 rows make only 12 steps of 1 row; more --epo"),
        (57, {"batch_size": 2, "epochs": 1}, None),
        (57, {"batch_size": 20, "max_steps": 3}, None),
        (2000, {}, None),
    ],
)
def test_what_few_rows_mean_is_said(n_rows, changes, said):
    note = data_note(TrainSpec(**changes), n_rows)
    assert note is None if said is None else note.startswith(said)


def test_an_epoch_is_planned_once_for_all_who_ask():
    """What is said of the steps before a training costs it no second plan."""
    asked = []

    def plan(epoch):
        asked.append(epoch)
        return [[np.arange(1)]] * 2

    schedule = Schedule(TrainSpec(epochs=2), plan, n_steps_per_epoch=2)
    assert schedule.epoch(0) == schedule.epoch(0)
    assert len(list(schedule.steps())) == 4
    assert asked == [0, 1]
