"""Connections with a time limit: who sends or takes nothing makes room for others.

uvicorn bounds the connections of all clients together and the time between two requests; a client
that never ends its headers, its body, or never reads, would stay. Here each of these has its time,
and one address its share of the connections. Beyond that there is a reverse proxy.
"""

import asyncio
import logging
from collections import Counter
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("swlora.web")
REQUEST_S = 20.0  # from the first byte awaited to the last of the body
UNREAD_S = 60.0  # with an answer that the client does not take
MAX_PER_ADDRESS = 250
# States of a client that has sent its request; the last of one that offers another protocol, too
COMPLETE = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.MIGHT_SWITCH_PROTOCOL)  # type: ignore[attr-defined]


class BoundedProtocol(H11Protocol):
    """A connection of a client; closed where it is one too many, or too slow."""

    _n_of_address: ClassVar[Counter[str]] = Counter()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; close at once what is one too many of its address."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._n_of_address[self._address] += 1
        self._request_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        if self._n_of_address[self._address] > MAX_PER_ADDRESS:
            log.warning("%s has %d connections: closed", self._address, MAX_PER_ADDRESS)
            transport.abort()
            return
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the address its share back."""
        self._stop(request=True, unread=True)
        self._n_of_address[self._address] -= 1
        if not self._n_of_address[self._address]:
            del self._n_of_address[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request, of which the whole has its time."""
        super().data_received(data)
        if self.conn.their_state in COMPLETE:
            self._stop(request=True)
        elif self._request_timer is None:
            self._await_request()

    def pause_writing(self) -> None:
        """Wait for the client to read, for a time."""
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(UNREAD_S, self._close, "reads no answer")

    def resume_writing(self) -> None:
        """Go on: the client reads."""
        self._stop(unread=True)
        super().resume_writing()

    def _await_request(self) -> None:
        self._request_timer = self.loop.call_later(REQUEST_S, self._close, "sends no whole request")

    def _close(self, reason: str) -> None:
        log.info("%s %s: closed", self._address, reason)
        self.transport.abort()

    def _stop(self, *, request: bool = False, unread: bool = False) -> None:
        if request and self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        if unread and self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
