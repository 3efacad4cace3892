"""A host whose decoders only count, and clients that note what they are told."""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from swlora.decoding.batch import DecodeRequest, Event
from swlora.errors import UserError
from swlora.models.anatomy import WeightAddress
from swlora.web.scheduler import Scheduler
from swlora.web.tickets import Ended, Ticket, Variant

INTACT, OTHER = Variant(), Variant("other")
BROKEN, ABSENT = Variant("broken"), Variant("absent")
ZEROED = Variant(None, frozenset([WeightAddress(0, "mlp.down_proj", 1, 2)]))


class FakeHost:
    """Counts, and holds every step until it may go on."""

    def __init__(self) -> None:
        self.current: Variant | None = None
        self.steps: list[tuple[Variant | None, tuple[int, ...]]] = []
        self.dropped: list[int] = []
        self.switches: list[Variant] = []
        self.forgotten: list[Variant] = []
        self.health: list[bool] = []  # what is found next, by checks and by rebuilding
        self.checks: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def load(self, variant: Variant, keep: Collection[Variant]) -> None:
        assert self.current is None
        assert variant not in keep
        if variant == ABSENT:
            raise UserError("this adapter is no longer there")

    @contextmanager
    def switched(self, variant: Variant) -> Iterator[None]:
        assert self.current is None
        self.current = variant
        self.switches.append(variant)
        try:
            yield
        finally:
            self.current = None

    def decoder(self, variant: Variant) -> "FakeDecoder":
        assert self.current == variant
        return FakeDecoder(self, variant)

    def forget(self, variant: Variant) -> None:
        self.forgotten.append(variant)

    def recover(self, keep: Collection[Variant]) -> bool:
        assert self.current is None
        self.checks.append(f"recover, {len(keep)} at work")
        return self.health.pop(0) if self.health else True

    def rebuild(self) -> bool:
        assert self.current is None
        self.checks.append("rebuild")
        return self.health.pop(0) if self.health else True


class FakeDecoder:
    """Says 1, 2, 3 ... for every row."""

    def __init__(self, host: FakeHost, variant: Variant) -> None:
        self.host, self.variant = host, variant
        self.rows: dict[int, list[int]] = {}

    def admit(self, requests: Sequence[DecodeRequest]) -> None:
        if any(request.prompt == [13] for request in requests):
            raise RuntimeError("out of memory")
        for request in requests:
            self.rows[request.request_id] = [0, request.max_new_tokens]

    def step(self) -> list[Event]:
        assert self.host.current == self.variant
        assert self.rows
        self.host.gate.wait(10)
        if self.variant == BROKEN:
            raise RuntimeError("nothing works")
        self.host.steps.append((self.variant, tuple(self.rows)))
        events = []
        for id_, row in list(self.rows.items()):
            row[0] += 1
            reason = "length" if row[0] == row[1] else None
            events.append(Event(id_, row[0], finish_reason=reason))
            if reason:
                del self.rows[id_]
        return events

    def drop(self, request_id: int) -> None:
        del self.rows[request_id]
        self.host.dropped.append(request_id)


class Client:
    """A ticket and what was delivered to it."""

    n_made = 0

    def __init__(self, n: int = 3, variant: Variant = INTACT, prompt: Sequence[int] = (5,)) -> None:
        self.news: list[Event | Ended] = []
        self.done = threading.Event()
        request = DecodeRequest(Client.n_made, list(prompt), n)
        Client.n_made += 1
        self.ticket = Ticket(request, variant, self.deliver)
        self.id = request.request_id

    def deliver(self, item: Event | Ended) -> None:
        assert not self.done.is_set(), "news after the end"
        self.news.append(item)
        if isinstance(item, Ended) or item.finish_reason:
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        assert self.done.wait(10)
        return [item.token_id for item in self.news if isinstance(item, Event)]

    @property
    def end(self) -> str:
        assert self.done.wait(10)
        last = self.news[-1]
        return last.reason if isinstance(last, Ended) else str(last.finish_reason)


def submit(scheduler: Scheduler, *clients: Client) -> None:
    scheduler.submit([client.ticket for client in clients])
