"""One thread owns the model; everybody else hands it tickets and gets tokens back.

Every turn: tickets that were cancelled or are overdue end, waiting ones are admitted, and the texts
of one variant grow by one token. Variants take turns, and the model is in a variant's state for its
own steps only. A ticket beyond `max_slots` at work and `queue` waiting is refused. A failure
ends the tickets of its own variant; after it, the base model must answer as it did at the start, or
nothing is taken on until it does.
"""

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from swlora.decoding.batch import Event
from swlora.errors import UserError
from swlora.threads import adapted_threads
from swlora.web.tickets import (
    Decoder,
    Ended,
    Host,
    Limits,
    ModelFailedError,
    QueueFullError,
    ShuttingDownError,
    Ticket,
    Variant,
)

FAILED = Ended("failed", "the server failed; its log says why")
RETRY_S = 5.0  # between attempts to bring the model back
log = logging.getLogger("swlora.web")


@dataclass
class _Batch:
    decoder: Decoder
    tickets: dict[int, Ticket] = field(default_factory=dict)


class Scheduler:
    """The queue, and the thread that works on it between `start` and `stop`."""

    def __init__(self, host: Host, limits: Limits) -> None:
        self._host, self._limits = host, limits
        self._changed = threading.Condition()  # guards the next four
        self._waiting: deque[Ticket] = deque()
        self._n_active = 0
        self._shutdown_s = math.inf
        self._stopping = False
        self._batches: OrderedDict[Variant, _Batch] = OrderedDict()  # the thread's, like the rest
        self._current: Variant | None = None
        self._state = ExitStack()
        self._service_s = 1.0  # moving average of the time that a text takes
        self._is_broken = False
        self._thread = threading.Thread(target=self._run, name="swlora-model", daemon=True)

    # For everybody

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; whoever is left is told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def drain(self, seconds: float) -> None:
        """Take nothing new from now on and end what is not done within `seconds`."""
        # No lock: this is called by a signal's handler, in the middle of anything.
        self._shutdown_s = min(self._shutdown_s, time.monotonic() + seconds)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Take on all tickets or none; QueueFullError, ShuttingDownError, ModelFailedError."""
        with self._changed:
            if self._stopping or self._shutdown_s < math.inf:
                raise ShuttingDownError
            if self._is_broken:
                raise ModelFailedError
            n_taken = self._n_active + len(self._waiting)
            if n_taken + len(tickets) > self._limits.max_slots + self._limits.queue:
                raise QueueFullError(self._retry_after_s())
            now_s = time.monotonic()
            for ticket in tickets:
                ticket.submitted_s, ticket.due_s = now_s, now_s + self._limits.deadline_s
            self._waiting.extend(tickets)
            self._changed.notify()

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """Stop work on tickets: waiting ones go at once, others before the next step."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
                if ticket in self._waiting:
                    self._waiting.remove(ticket)

    @property
    def is_ready(self) -> bool:
        """Whether tickets are taken."""
        is_going = self._thread.is_alive() and not self._stopping and self._shutdown_s == math.inf
        return is_going and not self._is_broken

    @property
    def is_broken(self) -> bool:
        """Whether the model failed and has not come back since."""
        return self._is_broken

    @property
    def n_waiting(self) -> int:
        """Number of tickets that wait."""
        return len(self._waiting)

    @property
    def n_active(self) -> int:
        """Number of texts that are being written."""
        return self._n_active

    def _retry_after_s(self) -> int:
        rounds = (len(self._waiting) + 1) / self._limits.max_slots
        return min(60, max(1, math.ceil(rounds * self._service_s)))

    # The thread

    @adapted_threads()
    def _run(self) -> None:
        while not self._stopping:
            try:
                self._wait()
                if self._is_broken and not self._stopping:
                    self._restore_model()
                self._turn()
            except Exception:  # whatever went wrong, the next request shall find a server
                log.exception("the model's thread failed")
                self._end_all_broken()
                self._restore_model()
        self._end_all(Ended("shutdown", "the server is shutting down"))
        self._leave()

    def _wait(self) -> None:
        """Sleep until there is something to do."""
        if not (self._waiting or self._n_active):
            self._enter(None)
        with self._changed:
            while not (self._waiting or self._n_active or self._stopping or self._is_broken):
                self._changed.wait()
            if self._is_broken and not self._stopping:
                self._changed.wait(RETRY_S)

    def _turn(self) -> None:
        self._end_overdue()
        for variant, tickets in self._next_tickets().items():
            self._admit(variant, tickets)
        if self._batches:
            variant, batch = next(iter(self._batches.items()))
            self._batches.move_to_end(variant)
            self._step(variant, batch)

    def _end_overdue(self) -> None:
        """End what was cancelled or is overdue."""
        now_s = time.monotonic()
        with self._changed:
            late = [ticket for ticket in self._waiting if self._due_s(ticket) <= now_s]
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in late)
        for ticket in late:
            self._deliver(ticket, self._overdue(ticket))
        for variant, batch in list(self._batches.items()):
            if variant not in self._batches:  # the failure of one before it ended all
                continue
            try:
                self._end_overdue_of(variant, batch, now_s)
            except Exception:
                self._fail(variant, "a text could not be taken out")

    def _end_overdue_of(self, variant: Variant, batch: _Batch, now_s: float) -> None:
        for ticket in list(batch.tickets.values()):
            if ticket.cancelled or self._due_s(ticket) <= now_s:
                batch.decoder.drop(ticket.request.request_id)
                self._leave_batch(variant, ticket)
                ended = Ended("cancelled") if ticket.cancelled else self._overdue(ticket)
                self._deliver(ticket, ended)

    def _due_s(self, ticket: Ticket) -> float:
        return min(ticket.due_s, self._shutdown_s)

    def _overdue(self, ticket: Ticket) -> Ended:
        if self._shutdown_s < ticket.due_s:
            return Ended("shutdown", "the server is shutting down")
        return Ended("deadline", f"the request took longer than {self._limits.deadline_s:g} s")

    def _next_tickets(self) -> dict[Variant, list[Ticket]]:
        """Take waiting tickets, the oldest first, while there are slots and memory for them."""
        groups: dict[Variant, list[Ticket]] = {}
        at_work = (t for batch in self._batches.values() for t in batch.tickets.values())
        longest = max((ticket.n_tokens for ticket in at_work), default=0)
        with self._changed:
            while self._waiting and self._n_active < self._limits.max_slots:
                longest = max(longest, self._waiting[0].n_tokens)
                if self._n_active and (self._n_active + 1) * longest > self._limits.cache_tokens:
                    break
                ticket = self._waiting.popleft()
                self._n_active += 1
                groups.setdefault(ticket.variant, []).append(ticket)
        return groups

    def _admit(self, variant: Variant, tickets: list[Ticket]) -> None:
        if self._is_broken:
            self._end(tickets, FAILED)
            return
        try:
            batch = self._batches.get(variant) or self._new_batch(variant)
            batch.decoder.admit([ticket.request for ticket in tickets])
        except UserError as error:  # nothing was taken on
            self._end(tickets, Ended("refused", str(error)))
        except Exception:
            self._fail(variant, "the model could not take a text on", tickets)
        else:
            batch.tickets.update((ticket.request.request_id, ticket) for ticket in tickets)
            self._batches[variant] = batch

    def _new_batch(self, variant: Variant) -> _Batch:
        self._enter(None)
        if self._is_broken:
            raise RuntimeError("the model did not come back from the variant before this one")
        self._host.load(variant, self._batches.keys())
        self._enter(variant)
        return _Batch(self._host.decoder(variant))

    def _step(self, variant: Variant, batch: _Batch) -> None:
        try:
            self._enter(variant)
            if self._batches.get(variant) is not batch:
                return  # it ended with all others when the model was put together again
            for event in batch.decoder.step():
                ticket = batch.tickets[event.request_id]
                self._deliver(ticket, event)
                if event.finish_reason:
                    self._leave_batch(variant, ticket)
                    took_s = time.monotonic() - ticket.submitted_s
                    self._service_s += 0.1 * (took_s - self._service_s)
        except Exception:  # the decoder is in an unknown state; other variants have their own
            self._fail(variant, "the model failed in a step")

    def _leave_batch(self, variant: Variant, ticket: Ticket) -> None:
        tickets = self._batches[variant].tickets
        del tickets[ticket.request.request_id]
        if not tickets:
            del self._batches[variant]
        with self._changed:
            self._n_active -= 1

    def _end(self, tickets: Sequence[Ticket], ended: Ended) -> None:
        """Tell tickets that were taken from the queue, and are in no batch, of their end."""
        with self._changed:
            self._n_active -= len(tickets)
        for ticket in tickets:
            self._deliver(ticket, ended)

    def _take_out(self, variant: Variant) -> list[Ticket]:
        """Forget a variant's batch; return its tickets, which nobody has told of their end."""
        self._host.forget(variant)
        batch = self._batches.pop(variant, None)
        return list(batch.tickets.values()) if batch is not None else []

    def _fail(self, variant: Variant, what: str, taken: Sequence[Ticket] = ()) -> None:
        """End the tickets of a variant because of the exception that is being handled.

        They are told last: whoever knows of a failure finds the server as ready as it is.
        """
        log.exception("%s (%s)", what, variant.adapter or "the base model")
        tickets = [*taken, *self._take_out(variant)]
        try:
            self._restore_model()
        finally:
            self._end(tickets, FAILED)

    def _restore_model(self) -> None:
        """Leave the variant, and bring the base model back to what it was at the start."""
        self._leave()
        try:
            is_whole = self._host.recover(list(self._batches))
        except Exception:
            log.exception("the model could not be checked after a failure")
            is_whole = False
        if not is_whole:  # then the other variants' texts may be wrong too
            self._end_all_broken()
            try:
                is_whole = self._host.rebuild()
            except Exception:
                log.exception("the model could not be put together again")
        if not is_whole:
            log.error("the model does not answer as it did: no texts are taken on until it does")
        with self._changed:
            self._is_broken = not is_whole

    def _end_all_broken(self) -> None:
        with self._changed:
            self._is_broken = True  # before anybody is told
        self._end_all(FAILED)

    def _end_all(self, ended: Ended) -> None:
        """End everything, also what waits."""
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        for ticket in waiting:
            self._deliver(ticket, ended)
        for variant in list(self._batches):
            self._end(self._take_out(variant), ended)

    def _deliver(self, ticket: Ticket, news: Event | Ended) -> None:
        try:
            ticket.deliver(news)
        except Exception:
            log.exception("a client could not be told")
            ticket.cancelled = True

    def _enter(self, variant: Variant | None) -> None:
        """Switch the model to a variant; None leaves it whole, for no variant."""
        if variant == self._current:
            return
        if not self._leave():
            self._restore_model()
        if variant is not None:
            self._state.enter_context(self._host.switched(variant))
            self._current = variant

    def _leave(self) -> bool:
        """Leave the model's variant; False where something could not be put back."""
        self._current = None
        try:
            self._state.close()
        except Exception:
            log.exception("the model could not be switched back")
            return False
        return True
