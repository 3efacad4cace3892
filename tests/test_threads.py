"""How many threads compute: fewer while other programs need the cores, all again afterwards."""

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.support.control_groups import lay_groups

from swlora import threads
from swlora.threads import (
    WINDOW_S,
    CpuClock,
    ThreadChoice,
    adapt_threads,
    adapted_threads,
    fix_threads,
    read_clock,
    settle_threads,
)


class Machine:
    """Clocks that a test moves on: cores' worth of CPU that this process and others use."""

    def __init__(self) -> None:
        self.now = CpuClock(100.0, 7.0, 5000.0)

    def read(self) -> CpuClock:
        return self.now

    def run(self, own: float, others: float, seconds: float = WINDOW_S) -> None:
        wall_s, own_s, all_s = self.now.wall_s, self.now.own_s, self.now.all_s
        self.now = CpuClock(
            wall_s + seconds, own_s + own * seconds, all_s + (own + others) * seconds
        )


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def chosen(machine) -> Callable[..., list[int]]:
    """A function (most, n_cores, others' cores by look) -> the numbers chosen at each look."""

    def look(most: int, n_cores: int, others: list[float]) -> list[int]:
        choice = ThreadChoice(most, n_cores, machine.read)
        numbers = []
        for taken in others:
            machine.run(own=choice.n, others=taken)
            numbers.append(choice.look())
        return numbers

    return look


@pytest.fixture
def untouched(monkeypatch) -> Iterator[None]:
    """Two threads, nothing known of the machine; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "_process", threads._Process())
    yield
    torch.set_num_threads(before)


def test_an_idle_machine_keeps_all_threads(chosen):
    assert chosen(2, 2, [0.0, 0.1, 0.3, 0.44]) == [2, 2, 2, 2]


def test_a_busy_program_takes_one_thread_at_once(chosen):
    assert chosen(2, 2, [0.0, 1.0, 1.0]) == [2, 1, 1]


def test_threads_come_back_when_two_looks_agree(chosen):
    assert chosen(2, 2, [1.0, 0.0, 1.0, 0.0, 0.0]) == [1, 1, 1, 1, 2]


def test_one_thread_is_the_least(chosen):
    assert chosen(2, 2, [2.0, 5.0]) == [1, 1]


@pytest.mark.parametrize(
    ("others", "expected"),
    [(0.4, 8), (1.0, 7), (1.5, 6), (3.0, 5), (7.9, 1)],
)
def test_every_core_that_is_taken_costs_one_thread(chosen, others, expected):
    assert chosen(8, 8, [others, others]) == [expected, expected]


def test_cores_without_a_thread_of_ours_are_given_away_first(chosen):
    assert chosen(4, 8, [3.0, 4.0, 5.0, 0.0, 0.0]) == [4, 4, 3, 3, 4]


def test_clocks_that_disagree_by_a_tick_are_no_negative_load(chosen):
    assert chosen(2, 2, [-0.05, 0.0]) == [2, 2]


def test_the_clocks_of_this_machine_move_as_this_process_works():
    first = read_clock()
    total = 0
    while read_clock().own_s - first.own_s < 0.3:
        total += sum(range(20_000))
    last = read_clock()
    assert last.wall_s - first.wall_s >= 0.2
    assert last.all_s - first.all_s > 0.1  # what this process did is part of it


def test_the_number_follows_the_machine_and_is_put_back(untouched, machine, monkeypatch):
    monkeypatch.setattr(threads, "read_clock", machine.read)
    monkeypatch.setattr(threads, "allowed_cores", lambda: {0, 1})
    monkeypatch.setattr(threads.time, "monotonic", lambda: machine.now.wall_s)
    with adapted_threads():
        machine.run(own=1.0, others=1.0, seconds=WINDOW_S / 2)
        adapt_threads()
        assert torch.get_num_threads() == 2  # too early for a look
        machine.run(own=1.0, others=1.0)
        adapt_threads()
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    machine.run(own=1.0, others=1.0)
    adapt_threads()  # no work of ours is under way
    assert torch.get_num_threads() == 2
    with adapted_threads():
        assert torch.get_num_threads() == 1  # known from the work before
        for _ in range(3):  # the first look goes back to when something else ran
            machine.run(own=1.0, others=0.0)
            adapt_threads()
        assert torch.get_num_threads() == 2


def test_the_number_is_put_back_after_an_error(untouched):
    with pytest.raises(ValueError), adapted_threads():
        torch.set_num_threads(1)
        raise ValueError
    assert torch.get_num_threads() == 2


def test_a_fixed_number_stays(untouched, machine, monkeypatch):
    monkeypatch.setattr(threads, "read_clock", machine.read)
    fix_threads(2)
    with adapted_threads():
        machine.run(own=1.0, others=2.0, seconds=10)
        adapt_threads()
        assert torch.get_num_threads() == 2


def test_a_number_holds_until_a_setting_names_none(untouched, machine, monkeypatch):
    monkeypatch.setattr(threads, "read_clock", machine.read)
    for n in (1, 3):
        settle_threads(n)
        assert torch.get_num_threads() == n
    settle_threads(None)  # a later training of this process
    assert torch.get_num_threads() == 2
    with adapted_threads():
        machine.run(own=1.0, others=2.0, seconds=10)
        adapt_threads()
        assert torch.get_num_threads() == 1
    fix_threads(2)  # by a program of its own, which no setting takes back
    settle_threads(None)
    with adapted_threads():
        adapt_threads()
        assert torch.get_num_threads() == 2


def test_threads_are_as_many_as_the_container_has_cpu_time_for(
    untouched, machine, tmp_path, monkeypatch
):
    """Eight cores of which two are paid for: what others use of the rest takes none of these."""
    monkeypatch.setattr(threads, "read_clock", machine.read)
    monkeypatch.setattr(threads, "allowed_cores", lambda: set(range(8)))
    monkeypatch.setattr(threads.time, "monotonic", lambda: machine.now.wall_s)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    lay_groups(monkeypatch, tmp_path, "0::/pod", {"pod/cpu.max": "150000 100000"})
    torch.set_num_threads(8)
    settle_threads(None)
    assert torch.get_num_threads() == 2
    with adapted_threads():
        machine.run(own=2.0, others=5.0)
        adapt_threads()
        assert torch.get_num_threads() == 2
    others = threads.others_share()
    assert others is not None
    machine.run(own=2.0, others=4.0)
    assert others.look() == 0.5
    settle_threads(3)  # who names a number gets it
    assert torch.get_num_threads() == 3
    settle_threads(None)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("quota", "asked"), [("max 100000", None), ("100000 100000", "5")])
def test_without_a_limit_or_with_a_number_of_ones_own_nothing_changes(
    quota, asked, untouched, tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    lay_groups(monkeypatch, tmp_path, "", {"cpu.max": quota})
    torch.set_num_threads(5)
    settle_threads(None)
    assert torch.get_num_threads() == 5


def test_a_machine_that_tells_nothing_keeps_its_threads(untouched, monkeypatch):
    def refuse() -> CpuClock:
        raise OSError("no /proc")

    monkeypatch.setattr(threads, "read_clock", refuse)
    with adapted_threads():
        adapt_threads()
        assert torch.get_num_threads() == 2
