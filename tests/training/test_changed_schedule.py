"""The steps of a training whose settings were changed on its way."""

from collections import Counter

import numpy as np
import pytest

from swlora.config import TrainSpec
from swlora.data.token_sequences import TokenSequences
from swlora.training.changed_schedule import ChangedSchedule, Stretch
from swlora.training.schedule import Schedule

N = 23
# 5 steps an epoch
FIRST = TrainSpec(epochs=2, batch_size=5, learning_rate=0.1, warmup_fraction=0.2)


@pytest.fixture(scope="module")
def sequences() -> TokenSequences:
    rng = np.random.default_rng(7)
    prompts = [rng.integers(1, 60, 5).tolist() for _ in range(6)]
    return TokenSequences.from_lists(
        [(prompts[i % 6], rng.integers(1, 60, 2 + i % 5).tolist()) for i in range(N)]
    )


def changed(sequences: TokenSequences, *changes: tuple[int, dict]) -> ChangedSchedule:
    spec, stretches = FIRST, [Stretch(0, FIRST)]
    for first, settings in changes:
        spec = TrainSpec.model_validate(spec.model_dump() | settings)
        stretches.append(Stretch(first, spec))
    return ChangedSchedule(sequences, stretches, seed=3)


def rows(steps) -> list[list[int]]:
    return [np.concatenate(list(step)).tolist() for step in steps]


def as_lists(steps) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in step] for step in steps]


def test_another_rate_changes_the_rates_after_it_alone(sequences):
    plain = Schedule.of(sequences, FIRST, 3)
    lower = Schedule.of(sequences, FIRST.model_copy(update={"learning_rate": 0.02}), 3)
    found = changed(sequences, (4, {"learning_rate": 0.02}))
    assert as_lists(found.steps()) == as_lists(plain.steps())
    assert [found.learning_rate(i) for i in range(10)] == [
        (plain if i < 4 else lower).learning_rate(i) for i in range(10)
    ]
    assert (found.spec_at(3).learning_rate, found.spec_at(4).learning_rate) == (0.1, 0.02)


def test_more_epochs_add_those_of_a_longer_training(sequences):
    longer = Schedule.of(sequences, FIRST.model_copy(update={"epochs": 4}), 3)
    for at in (3, 10):  # under way, and when it was done
        found = changed(sequences, (at, {"epochs": 4}))
        assert found.n_steps == 20
        assert as_lists(found.steps()) == as_lists(longer.steps())
        assert found.learning_rate(15) == longer.learning_rate(15)
        assert found.learning_rate(2) == Schedule.of(sequences, FIRST, 3).learning_rate(2)


def test_fewer_epochs_end_it(sequences):
    assert changed(sequences, (7, {"epochs": 1})).n_steps == 7
    assert changed(sequences, (3, {"epochs": 1})).n_steps == 5


@pytest.mark.parametrize(("at", "size"), [(2, 3), (2, 9), (5, 4), (7, 2)])
def test_with_another_batch_size_every_sequence_is_run_once_an_epoch(at, size, sequences):
    plain, found = Schedule.of(sequences, FIRST, 3), changed(sequences, (at, {"batch_size": size}))
    steps = rows(found.steps())
    assert steps[:at] == rows(plain.steps())[:at]
    assert Counter(i for step in steps for i in step) == dict.fromkeys(range(N), 2)
    n_seen = sum(len(step) for step in steps[: at - at // 5 * 5]) if at > 5 else 0
    assert len(steps) == found.n_steps and n_seen <= N
    n_left_of_epoch = N - sum(map(len, rows(plain.steps())[at // 5 * 5 : at]))
    n_new = -(-n_left_of_epoch // size) if at % 5 else 0
    n_whole = 2 - at // 5 - (at % 5 > 0)
    assert found.n_steps == at + n_new + n_whole * -(-N // size)
    end = at + n_new  # of the epoch in which it changed
    if at % 5:
        epoch = [i for step in steps[at // 5 * 5 : end] for i in step]
        assert sorted(epoch) == list(range(N))
    assert max(len(step) for step in steps[at:]) <= size + 3  # whole prompts may be together


def test_its_rate_is_that_of_the_same_place_in_the_data(sequences):
    found = changed(sequences, (4, {"batch_size": 2, "warmup_fraction": 0.0}))
    n_seen = sum(map(len, rows(found.steps())[:4]))
    n_steps = found.n_steps - 4 + n_seen / 2
    for step in (4, 9, found.n_steps - 1):
        expected = 0.1 * (1 - (n_seen / 2 + step - 4) / n_steps)
        assert found.learning_rate(step) == pytest.approx(expected, rel=1e-12)


def test_a_batch_size_that_nobody_gave_stays_as_it_was(sequences):
    spec = FIRST.model_copy(update={"batch_size": None, "max_steps": 12})
    size = Schedule.of(sequences, spec, 3).spec.batch_size
    longer = spec.model_copy(update={"epochs": 9})
    assert Schedule.of(sequences, longer, 3).spec.batch_size != size
    found = ChangedSchedule(sequences, [Stretch(0, spec), Stretch(3, longer)], 3)
    assert found.spec.batch_size == size


def test_epochs_that_nobody_gave_stay_as_they_were(sequences):
    first = FIRST.model_copy(update={"epochs": None})
    rate = first.model_copy(update={"learning_rate": 0.02})
    found = ChangedSchedule(sequences, [Stretch(0, first), Stretch(4, rate)], 3)
    assert found.n_steps == Schedule.of(sequences, first, 3).n_steps == 15
    assert found.n_epochs == found.spec.epochs == 3
    cut = rate.model_copy(update={"max_steps": 7})
    assert ChangedSchedule(sequences, [Stretch(0, first), Stretch(4, cut)], 3).n_epochs == 2


def test_the_steps_that_are_left_are_those_of_the_whole(sequences):
    found = changed(
        sequences, (2, {"batch_size": 3}), (4, {"learning_rate": 0.3}), (6, {"row_tokens": 64})
    )
    whole = as_lists(found.steps())
    for n_done in range(found.n_steps + 1):
        assert as_lists(found.steps(n_done)) == whole[n_done:]


def test_of_changes_at_one_step_the_last_counts(sequences):
    found = changed(sequences, (4, {"batch_size": 2}), (4, {"batch_size": 5}))
    assert as_lists(found.steps()) == as_lists(Schedule.of(sequences, FIRST, 3).steps())


def test_a_limit_of_steps_is_that_of_all_steps(sequences):
    assert changed(sequences, (4, {"max_steps": 8})).n_steps == 8
    assert len(list(changed(sequences, (4, {"max_steps": 8})).steps(4))) == 4


def test_an_epoch_is_shown_as_it_is_planned_from_now_on(sequences):
    """By which the memory of a step is foreseen."""
    larger = FIRST.model_copy(update={"batch_size": 12})
    found = changed(sequences, (4, {"batch_size": 12})).epoch(0)
    assert as_lists(found) == as_lists(Schedule.of(sequences, larger, 3).epoch(0))
