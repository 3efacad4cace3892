"""A server under strange requests, clients that leave, and clients that never end their request."""

import random
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx2
import psutil
from starlette.testclient import TestClient
from tests.support.fuzzed_requests import strange_request
from tests.support.servers import Running, in_process, running_server, tiny_service, until

from swlora.web.connections import MAX_PER_ADDRESS, REQUEST_S, BoundedProtocol
from swlora.web.service import Service

OTHER_ADDRESS = "127.0.0.2"  # of a client beside the slow ones
MAX_GROWTH = 1.03  # of the memory after the first tenth
STREAMED = {"model": "model", "prompt": "Hello", "max_tokens": 150, "stream": True}


@dataclass(frozen=True)
class Load:
    """How many of each kind; `request_s` is the time that the server gives to a request."""

    strange: int
    leaving: int
    slow: int
    request_s: float = REQUEST_S
    checks_growth: bool = True  # too few requests show what is kept for the next ones alone


LONG = Load(20_000, 1_000, 500)
QUICK = Load(200, 20, 30, request_s=0.6, checks_growth=False)


@dataclass
class Strain:
    """What came of it: how much was asked, what was wrong, memory before and after."""

    n: int = 0
    failures: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    most_connections: int = 0
    texts_left: int = 0  # whose client went away before their end
    statuses: dict[int, int] = field(default_factory=dict)

    def more(self) -> dict[str, Any]:
        """Return the figures beside the count."""
        return {
            "statuses": dict(sorted(self.statuses.items())),
            "most_connections": self.most_connections,
            "texts_left_before_their_end": self.texts_left,
            "memory_growth": round(self.growth, 4),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    @property
    def growth(self) -> float:
        """The memory after all of it, over that after the first tenth of the requests."""
        return self.bytes_after / self.bytes_before


def strain(model: Path, runs: Path, load: Load) -> Strain:
    """Ask for strange things, leave answers unread, and send half of requests."""
    found = Strain()
    with (
        patch("swlora.web.connections.REQUEST_S", load.request_s),
        in_process(model, runs) as (client, service),
        running_server(tiny_service(model, runs)) as running,
    ):
        for share in (1, 9):
            _ask_strangely(found, client, service, load.strange * share // 10)
            _leave(found, running, load.leaving * share // 10)
            found.bytes_before = found.bytes_before or _memory_bytes()
        _send_half(found, running, load)
        registry = running.service.metrics.registry
        left = registry.get_sample_value("swlora_texts_total", {"reason": "cancelled"})
        found.texts_left = int(left or 0)
        found.bytes_after = _memory_bytes()
    found.n += load.checks_growth
    if load.checks_growth and found.growth >= MAX_GROWTH:
        found.failures.append(f"memory grew to {found.growth:.3f} of what it was")
    return found


def _ask_strangely(found: Strain, client: TestClient, service: Service, n: int) -> None:
    """Send strange requests to an application in this process."""
    pick = random.Random(n)
    for _ in range(n):
        response, what = strange_request(client, pick)
        status = response.status_code
        found.statuses[status] = found.statuses.get(status, 0) + 1
        found.n += 1
        if not 200 <= status < 500 or "Traceback" in response.text:
            found.failures.append(what)
    _check_no_ticket_left(found, service)


def _leave(found: Strain, running: Running, n: int) -> None:
    """Ask for a long text and go away: before it, in the middle of it, or at once."""
    pick = random.Random(n)
    for _ in range(n):
        with (
            running.client() as client,
            client.stream("POST", "/v1/completions", json=STREAMED) as r,
        ):
            found.n += 1
            if r.status_code not in (200, 429):
                found.failures.append(f"a text that is not read: {r.status_code}")
            for _, _part in zip(range(pick.randrange(4)), r.iter_bytes(), strict=False):
                continue
    _check_no_ticket_left(found, running.service)


def _send_half(found: Strain, running: Running, load: Load) -> None:
    """Open connections that send half of a request, while another address is answered."""
    host, port = running.url.removeprefix("http://").split(":")
    transport = httpx2.HTTPTransport(local_address=OTHER_ADDRESS)
    beside = httpx2.Client(base_url=running.url, transport=transport)
    with ExitStack() as clients, beside as other:
        slow = []
        for _ in range(load.slow):
            slow.append(clients.enter_context(socket.create_connection((host, int(port)), 20)))
            slow[-1].sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
        expected = min(load.slow, MAX_PER_ADDRESS)
        until(lambda: BoundedProtocol._n_of_address[host] == expected)  # the others are closed
        found.most_connections = BoundedProtocol._n_of_address[host]
        if other.get("/health").status_code != 200:
            found.failures.append("another address was not answered")
        until_s = time.monotonic() + load.request_s + 10
        for client in slow:
            found.n += 1
            client.settimeout(max(0.1, until_s - time.monotonic()))
            if not _is_closed(client):
                found.failures.append("a slow client was not closed")


def _is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def _check_no_ticket_left(found: Strain, service: Service) -> None:
    scheduler = service.scheduler
    try:
        until(lambda: scheduler.n_active == scheduler.n_waiting == 0, seconds=30)
    except AssertionError:
        left = f"{scheduler.n_active} active and {scheduler.n_waiting} waiting"
        found.failures.append(f"tickets are left when all clients have gone: {left}")


def _memory_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
