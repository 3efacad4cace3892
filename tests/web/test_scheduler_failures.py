"""What fails ends its own tickets, and the model is looked at before anything goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.support.fake_host import BROKEN, INTACT, OTHER, Client, submit

from swlora.decoding.batch import Event
from swlora.web.scheduler import Scheduler
from swlora.web.tickets import Ended, ModelFailedError, Variant


def test_a_failure_ends_its_own_tickets_and_the_model_is_looked_at(host, make_scheduler):
    scheduler = make_scheduler()
    fine, broken = Client(5, OTHER), Client(variant=BROKEN)
    submit(scheduler, fine, broken)
    scheduler.start()
    assert fine.tokens == [1, 2, 3, 4, 5]
    assert broken.end == "failed"
    assert host.checks == ["recover, 1 at work"]
    assert scheduler.is_ready


def test_a_model_that_is_not_what_it_was_is_put_together_again(host, make_scheduler, until):
    """Nobody knows what the others would have got: they end, too."""
    scheduler = make_scheduler()
    host.health = [False, True]
    other, broken = Client(4000, OTHER), Client(variant=BROKEN)
    submit(scheduler, other, broken)
    scheduler.start()
    assert (other.end, broken.end) == ("failed", "failed")
    until(lambda: host.checks[1:] == ["rebuild"])
    until(lambda: scheduler.n_active == 0)
    assert not scheduler.is_broken
    again = Client()
    submit(scheduler, again)
    assert again.tokens == [1, 2, 3]


def test_a_model_that_stays_broken_takes_nothing_on_until_it_is_back(
    host, make_scheduler, until, monkeypatch
):
    monkeypatch.setattr("swlora.web.scheduler.RETRY_S", 0.01)
    scheduler = make_scheduler()
    host.health = [False] * 6 + [True]
    broken = Client(variant=BROKEN)
    submit(scheduler, broken)
    scheduler.start()
    assert broken.end == "failed"
    until(lambda: scheduler.is_broken or not host.health)
    if not scheduler.is_ready:
        with pytest.raises(ModelFailedError):
            submit(scheduler, Client())
    until(lambda: scheduler.is_ready)
    assert host.checks.count("rebuild") == 3
    again = Client()
    submit(scheduler, again)
    assert again.tokens == [1, 2, 3]


class Watcher(Client):
    """Notes whether the server said that it was ready when this client was told of its end."""

    def __init__(self, scheduler: Scheduler, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scheduler = scheduler

    def deliver(self, item: Event | Ended) -> None:
        self.was_ready = self.scheduler.is_ready
        super().deliver(item)


@pytest.mark.parametrize("failing", [{"variant": BROKEN}, {"variant": BROKEN, "prompt": [13]}])
@pytest.mark.parametrize(
    ("health", "is_ready", "end_of_other"),
    [([True], True, "length"), ([False, True], True, "failed"), ([False] * 2, False, "failed")],
)
def test_who_is_told_of_a_failure_finds_the_server_as_ready_as_it_is(
    host, make_scheduler, failing, health, is_ready, end_of_other
):
    """Whoever asks /ready after an error must not be told yes, and refused a moment later."""
    scheduler = make_scheduler()
    host.health = list(health)
    other, broken = Watcher(scheduler, 5, OTHER), Watcher(scheduler, **failing)
    submit(scheduler, other, broken)
    scheduler.start()
    assert (other.end, broken.end) == (end_of_other, "failed")
    assert broken.was_ready == is_ready
    assert other.was_ready == (end_of_other == "length")


def test_a_failure_of_the_thread_itself_is_told_by_a_server_that_is_not_ready(
    host, make_scheduler, monkeypatch, until
):
    scheduler = make_scheduler()
    own, n_calls = scheduler._end_overdue, [0]

    def once() -> None:
        n_calls[0] += 1
        if n_calls[0] == 1:
            raise RuntimeError("nobody foresaw this")
        own()

    monkeypatch.setattr(scheduler, "_end_overdue", once)
    waiting = Watcher(scheduler)
    submit(scheduler, waiting)
    scheduler.start()
    assert waiting.end == "failed"
    assert not waiting.was_ready
    until(lambda: scheduler.is_ready)
    again = Client()
    submit(scheduler, again)
    assert again.tokens == [1, 2, 3]


def test_a_failure_while_switching_or_leaving_does_not_end_the_thread(
    host, make_scheduler, until, monkeypatch
):
    scheduler = make_scheduler()
    scheduler.start()
    own = host.switched

    @contextmanager
    def halfway(variant: Variant) -> Iterator[None]:
        with own(variant):
            yield
        raise RuntimeError("could not switch back")

    monkeypatch.setattr(host, "switched", halfway)
    first = Client()
    submit(scheduler, first)
    assert first.tokens == [1, 2, 3]
    until(lambda: host.checks)  # leaving it failed, with nobody at work

    @contextmanager
    def never(_variant: Variant) -> Iterator[None]:
        raise RuntimeError("cannot be switched")
        yield

    monkeypatch.setattr(host, "switched", never)
    second = Client(variant=OTHER)
    submit(scheduler, second)
    assert second.end == "failed"
    monkeypatch.setattr(host, "switched", own)
    third = Client(variant=OTHER)
    submit(scheduler, third)
    assert third.tokens == [1, 2, 3]
    assert scheduler.is_ready


@pytest.mark.parametrize(
    ("order", "health", "stays_broken"),
    [((INTACT, OTHER), [False, True], False), ((OTHER, INTACT), [False] * 8, True)],
)
def test_a_model_that_was_not_left_whole_writes_nothing_more(
    host, make_scheduler, monkeypatch, until, order, health, stays_broken
):
    """Neither for texts that ended meanwhile nor for those that are taken on in that turn."""
    scheduler = make_scheduler()
    host.health, own = list(health), host.switched

    @contextmanager
    def half_left(variant: Variant) -> Iterator[None]:
        with own(variant):
            yield
        if variant == OTHER:
            raise RuntimeError("could not switch back")

    monkeypatch.setattr(host, "switched", half_left)
    clients = [Client(5, variant) for variant in order]
    submit(scheduler, *clients)
    scheduler.start()
    assert [client.end for client in clients] == ["failed", "failed"]
    if not stays_broken:
        until(lambda: scheduler.is_ready)  # these were told before it was put together again
        again = Client()
        submit(scheduler, again)
        assert again.tokens == [1, 2, 3]
    assert scheduler.is_broken == stays_broken
    stepped = [ids for _, ids in host.steps]
    assert stepped == ([] if stays_broken else [(again.id,)] * 3)
    assert all(client.tokens == [] for client in clients)


def test_a_client_that_cannot_be_told_harms_its_own_variant_only(host, make_scheduler):
    scheduler = make_scheduler()
    deaf, fine = Client(3, OTHER), Client(5)

    def raising(_item) -> None:
        raise RuntimeError("nobody listens")

    deaf.ticket.deliver = raising
    same = Client(4, OTHER)
    submit(scheduler, deaf, same, fine)
    scheduler.start()
    assert fine.tokens == [1, 2, 3, 4, 5]
    assert same.tokens == [1, 2, 3, 4]
    assert scheduler.is_ready
    assert host.checks == []
