"""The queue, turns, cancelling and deadlines, with a decoder that only counts."""

import threading
import time

import pytest
from tests.support.fake_host import ABSENT, BROKEN, INTACT, OTHER, ZEROED, Client, submit

from swlora.web.tickets import QueueFullError, ShuttingDownError


def test_texts_of_a_variant_are_one_batch(host, make_scheduler):
    scheduler = make_scheduler()
    clients = [Client(n) for n in (1, 2, 4)]
    submit(scheduler, *clients)
    scheduler.start()
    assert [c.tokens for c in clients] == [[1], [1, 2], [1, 2, 3, 4]]
    ids = [c.id for c in clients]
    assert [rows for _, rows in host.steps] == [tuple(ids), tuple(ids[1:]), (ids[2],), (ids[2],)]
    assert host.switches == [INTACT]


def test_a_newcomer_joins_between_steps(host, make_scheduler, until):
    scheduler = make_scheduler()
    scheduler.start()
    host.gate.clear()
    first, second = Client(50), Client(2)
    submit(scheduler, first)
    until(lambda: scheduler.n_active == 1)
    submit(scheduler, second)
    host.gate.set()
    assert second.tokens == [1, 2]
    assert first.tokens == list(range(1, 51))
    assert (INTACT, (first.id, second.id)) in host.steps


def test_variants_take_turns_and_each_step_is_in_its_own(host, make_scheduler, until):
    scheduler = make_scheduler()
    clients = [Client(6, v) for v in (INTACT, OTHER, ZEROED)]
    submit(scheduler, *clients)
    scheduler.start()
    assert all(c.tokens == [1, 2, 3, 4, 5, 6] for c in clients)
    assert [variant for variant, _ in host.steps] == [INTACT, OTHER, ZEROED] * 6
    until(lambda: host.current is None)  # nobody's use: the model is whole again


def test_a_full_queue_refuses_and_loses_nothing(host, make_scheduler, until):
    scheduler = make_scheduler(max_slots=1, queue=8)
    scheduler.start()
    host.gate.clear()
    accepted, refused = [], 0
    for _ in range(50):
        client = Client(2)
        try:
            submit(scheduler, client)
            accepted.append(client)
        except QueueFullError as error:
            assert 1 <= error.retry_after_s <= 60
            refused += 1
    assert (len(accepted), refused) == (9, 41)
    host.gate.set()
    assert all(client.tokens == [1, 2] for client in accepted)
    until(lambda: scheduler.n_active == 0)
    submit(scheduler, Client())  # there is room again


def test_a_refusal_says_when_a_place_will_be_free(make_scheduler):
    scheduler = make_scheduler(max_slots=2, queue=3)  # not started: all five wait
    scheduler._service_s = 7.0
    submit(scheduler, *(Client(1) for _ in range(5)))
    with pytest.raises(QueueFullError) as refused:
        submit(scheduler, Client(1))
    assert refused.value.retry_after_s == 21  # (5 + 1) / 2 rounds of 7 s
    scheduler._service_s = 1000.0
    with pytest.raises(QueueFullError) as refused:
        submit(scheduler, Client(1))
    assert refused.value.retry_after_s == 60


def test_the_time_that_texts_take_is_learnt(make_scheduler, until):
    scheduler = make_scheduler()
    scheduler._service_s = 100.0
    scheduler.start()
    submit(scheduler, Client(1))
    until(lambda: scheduler._service_s != 100.0)
    assert scheduler._service_s == pytest.approx(90.0, abs=2)  # a tenth of the way to nearly none


def test_texts_beside_each_other_come_together_or_not_at_all(host, make_scheduler):
    scheduler = make_scheduler(max_slots=1, queue=2)
    submit(scheduler, Client(), Client())
    with pytest.raises(QueueFullError):
        submit(scheduler, Client(), Client(variant=ZEROED))
    assert scheduler.n_waiting == 2


def test_memory_bounds_the_rows(host, make_scheduler):
    """Rows times the longest of them: two of 30 tokens fit, the third waits; one alone may."""
    scheduler = make_scheduler(cache_tokens=70)
    clients = [Client(10, prompt=[1] * 20), Client(20, prompt=[1] * 10), Client(1, prompt=[1] * 29)]
    clients.append(Client(2, prompt=[1] * 500))
    submit(scheduler, *clients)
    scheduler.start()
    assert [len(c.tokens) for c in clients] == [10, 20, 1, 2]
    together = [{clients.index(c) for c in clients if c.id in rows} for _, rows in host.steps]
    assert together[0] == {0, 1}
    assert {1, 2} in together
    assert not any(3 in rows and len(rows) > 1 for rows in together)


def test_what_waits_is_cancelled_at_once(host, make_scheduler, until):
    scheduler = make_scheduler(max_slots=1)
    scheduler.start()
    host.gate.clear()
    busy, waiting = Client(1), Client(1)
    submit(scheduler, busy)
    until(lambda: scheduler.n_active == 1)
    submit(scheduler, waiting)
    scheduler.cancel([waiting.ticket])
    assert scheduler.n_waiting == 0  # the place is free although the thread is at work
    host.gate.set()
    assert busy.tokens == [1]
    assert waiting.news == []


def test_what_is_at_work_is_cancelled_before_the_next_step(host, make_scheduler, until):
    scheduler = make_scheduler()
    scheduler.start()
    host.gate.clear()
    left, stays = Client(1000), Client(5)
    submit(scheduler, left, stays)
    until(lambda: scheduler.n_active == 2)
    scheduler.cancel([left.ticket])
    host.gate.set()
    assert stays.tokens == [1, 2, 3, 4, 5]
    assert left.end == "cancelled"
    assert len(left.tokens) <= 2
    assert host.dropped == [left.id]


def test_a_deadline_counts_in_the_queue_and_at_work(host, make_scheduler):
    scheduler = make_scheduler(max_slots=1, deadline_s=0.3)
    scheduler.start()
    at_work, waiting = Client(10**9), Client(10**9)
    start_s = time.monotonic()
    submit(scheduler, at_work, waiting)
    assert at_work.end == waiting.end == "deadline"
    assert 0.25 < time.monotonic() - start_s < 5
    assert at_work.tokens
    assert not waiting.tokens
    assert "0.3 s" in at_work.news[-1].message


def test_a_variant_that_cannot_be_had_is_refused_and_the_others_go_on(host, make_scheduler):
    scheduler = make_scheduler()
    absent, broken, too_much, fine = (
        Client(variant=ABSENT),
        Client(variant=BROKEN),
        Client(variant=OTHER, prompt=[13]),
        Client(),
    )
    submit(scheduler, absent, broken, too_much, fine)
    scheduler.start()
    assert fine.tokens == [1, 2, 3]
    assert (absent.end, broken.end, too_much.end) == ("refused", "failed", "failed")
    assert "no longer there" in absent.news[-1].message
    assert "nothing works" not in broken.news[-1].message  # that is for the log
    again = [Client(variant=OTHER), Client()]
    submit(scheduler, *again)
    assert all(c.tokens == [1, 2, 3] for c in again)
    assert scheduler.n_active == 0
    assert host.forgotten == [OTHER, BROKEN]  # what is in their decoders, nobody knows


def test_draining_finishes_what_can_be_finished(host, make_scheduler):
    scheduler = make_scheduler()
    scheduler.start()
    short, long = Client(3), Client(10**9)
    submit(scheduler, short, long)
    scheduler.drain(0.3)
    assert not scheduler.is_ready
    with pytest.raises(ShuttingDownError):
        submit(scheduler, Client())
    assert short.tokens == [1, 2, 3]
    assert long.end == "shutdown"


def test_stopping_ends_everything(host, make_scheduler, until):
    scheduler = make_scheduler(max_slots=1)
    scheduler.start()
    clients = [Client(10**9), Client(3)]
    submit(scheduler, *clients)
    until(lambda: host.steps)
    scheduler.stop()
    assert [c.end for c in clients] == ["shutdown", "shutdown"]
    assert host.current is None
    with pytest.raises(ShuttingDownError):
        submit(scheduler, Client())


def test_many_clients_from_many_threads(host, make_scheduler):
    scheduler = make_scheduler(max_slots=3, queue=5)
    scheduler.start()
    served, refused = [], []

    def ask(number: int) -> None:
        for k in range(20):
            client = Client(1 + (number + k) % 4, (INTACT, OTHER, ZEROED)[k % 3])
            try:
                submit(scheduler, client)
            except QueueFullError:
                refused.append(client)
                continue
            if (number + k) % 5 == 0:
                scheduler.cancel([client.ticket])
            else:
                assert client.tokens == list(range(1, client.ticket.request.max_new_tokens + 1))
                served.append(client)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(served) + len(refused) > 100
    assert len(served) > 20
