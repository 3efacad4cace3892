"""The web server on a loopback socket, in a thread of this process."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from starlette.testclient import TestClient

from swlora.config import ModelSpec, ServeSpec
from swlora.models.load import load_model
from swlora.web.app import create_app
from swlora.web.guard import Policy
from swlora.web.server import Server, listening_socket
from swlora.web.service import Service, make_service


@dataclass(frozen=True)
class Running:
    """A server on a loopback socket."""

    url: str
    service: Service
    server: Server

    def client(self) -> httpx2.Client:
        """Return a client of its own connections."""
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False)


def until(condition: Callable[[], object], seconds: float = 20.0) -> float:
    """Wait for a condition; return how long that took."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < seconds, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - start_s


@contextmanager
def running_server(service: Service, policy: Policy | None = None) -> Iterator[Running]:
    """Serve while the body runs."""
    listener = listening_socket("127.0.0.1", 0)
    server = Server(service, policy or Policy())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def tiny_service(model: Path, runs: Path) -> Service:
    """Return a service of the model in a folder, with float32 on the CPU."""
    loaded = load_model(ModelSpec(name=str(model), dtype="float32", device="cpu"))
    return make_service(ServeSpec(runs=runs, max_tokens=200), loaded)


@contextmanager
def in_process(model: Path, runs: Path) -> Iterator[tuple[TestClient, Service]]:
    """Yield a client of an application in this process, without a socket, and its service."""
    service = tiny_service(model, runs)
    app, url = create_app(service, Policy()), "http://localhost:8000"
    with TestClient(app, base_url=url, raise_server_exceptions=False) as client:
        yield client, service
