"""Clients that are slow or many, on a real socket: each has its time, and others are served."""

import socket
import time

import httpx2
import pytest

from swlora.web import connections
from swlora.web.service import make_service

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
LIMIT_S = 0.6


@pytest.fixture
def running(loaded, runs, run_server, monkeypatch):
    from swlora.config import ServeSpec

    monkeypatch.setattr(connections, "REQUEST_S", LIMIT_S)
    monkeypatch.setattr(connections, "UNREAD_S", LIMIT_S)
    monkeypatch.setattr(connections, "MAX_PER_ADDRESS", 40)
    with run_server(make_service(ServeSpec(runs=runs), loaded)) as running:
        yield running


def connect(running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def is_closed(client: socket.socket) -> bool:
    """Say whether the server ended the connection, waiting for it."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def wait_for_no_connection() -> None:
    """Wait until the server has ended every connection, as it sees it itself."""
    until_s = time.monotonic() + 30
    while connections.BoundedProtocol._n_of_address:
        assert time.monotonic() < until_s
        time.sleep(0.01)


def read_until(client: socket.socket, end: bytes) -> bytes:
    """Return what the server sends up to `end`; all of it where the connection ends before."""
    received = b""
    while not received.endswith(end) and (part := client.recv(4096)):
        received += part
    return received


HALF_SENT = {
    "nothing": b"",
    "half of the headers": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
    "half of a body": b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
}


@pytest.mark.parametrize("sent", HALF_SENT.values(), ids=HALF_SENT)
def test_a_request_that_does_not_end_is_closed_and_others_are_served(running, sent):
    clients = [connect(running) for _ in range(20)]
    for client in clients:
        client.sendall(sent)
    start_s = time.monotonic()
    assert httpx2.get(f"{running.url}/health").status_code == 200
    assert all(is_closed(client) for client in clients)
    assert time.monotonic() - start_s >= LIMIT_S / 2
    assert httpx2.get(f"{running.url}/health").status_code == 200


def test_a_byte_now_and_then_makes_no_difference(running):
    client = connect(running)
    start_s = time.monotonic()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while time.monotonic() - start_s < 10 * LIMIT_S:
            client.sendall(b"G")
            time.sleep(LIMIT_S / 10)
    assert time.monotonic() - start_s < 5 * LIMIT_S


def test_one_address_has_its_share_of_the_connections(running, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_S", 30.0)  # else time alone would close it
    clients = [connect(running) for _ in range(40)]
    for client in clients:
        client.sendall(b"GET")
    one_too_many = connect(running)
    assert is_closed(one_too_many)
    for client in clients:
        client.close()
    wait_for_no_connection()
    assert httpx2.get(f"{running.url}/health").status_code == 200


def test_a_connection_that_is_kept_is_used_again(running):
    with httpx2.Client() as client:
        for _ in range(3):
            assert client.get(f"{running.url}/health").status_code == 200
            time.sleep(LIMIT_S * 1.2)
        assert client.post(f"{running.url}/api/restaurant", json={"fields": {}}).status_code < 500


def test_a_client_that_offers_another_protocol_is_served_as_others_are(running):
    """As curl --http2 and Java's client do; the server stays with HTTP/1.1."""
    client = connect(running)
    head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    client.sendall(head + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert read_until(client, b'{"status":"ok"}').startswith(b"HTTP/1.1 200")
    time.sleep(LIMIT_S * 1.5)
    client.sendall(head + b"\r\n")
    assert read_until(client, b'{"status":"ok"}').startswith(b"HTTP/1.1 200")


def test_who_does_not_read_is_closed(running):
    """Many requests in one go, whose answers fill what the system keeps for the client."""
    client = connect(running)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    request = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    client.settimeout(0.1)
    for _ in range(2000):
        try:
            client.send(request)
        except OSError:  # the server takes no more: it waits for us, or has closed
            break
    wait_for_no_connection()
    assert httpx2.get(f"{running.url}/health").status_code == 200
