"""Work ahead: in order, one item ahead and no more, and its errors where they belong."""

import threading

import pytest

from swlora.data.ahead import worked_ahead


def test_the_work_on_the_next_item_goes_on_while_the_last_is_used():
    is_begun = [threading.Event() for _ in range(3)]
    threads = set()

    def work(i: int) -> int:
        threads.add(threading.get_ident())
        is_begun[i].set()
        return 10 * i

    asked: list[int] = []

    def items():
        for i in range(3):
            asked.append(i)
            yield i

    found = []
    for i, result in worked_ahead(items(), work):
        found.append((i, result))
        assert asked == [*range(min(i + 2, 3))]
        if i < 2:
            assert is_begun[i + 1].wait(timeout=10)
    assert found == [(0, 0), (1, 10), (2, 20)]
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert list(worked_ahead([], work)) == []


def test_an_error_is_raised_where_its_item_is_due():
    found = []
    with pytest.raises(ZeroDivisionError):
        for i, result in worked_ahead([2, 1, 0, 3], lambda i: 6 // i):
            found.append((i, result))
    assert found == [(2, 3), (1, 6)]


def test_the_thread_ends_with_a_loop_that_is_left():
    before = threading.active_count()
    for _ in worked_ahead(range(9), abs):
        break
    assert threading.active_count() <= before + 1
