"""The process: a socket, the service behind it, and a shutdown that lets texts be finished."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from swlora.config import RunSpec, ServeSpec
from swlora.errors import UserError
from swlora.paths import expanded
from swlora.progress import Progress
from swlora.web.connections import BoundedProtocol
from swlora.web.guard import Policy
from swlora.web.logs import configure_logging
from swlora.web.training.allowed import check_allowed

if TYPE_CHECKING:
    from swlora.web.service import Service

KEY_VARIABLE = "SWLORA_API_KEY"
DRAIN_S = 10.0
CLOSING_S = 1.0  # of these, to send the last news
MAX_CONNECTIONS = 1000


def serve(spec: RunSpec, make_progress: Callable[[], Progress]) -> None:
    """Serve until a signal comes; UserError where the server cannot start."""
    own = spec.serve
    key = api_key(own)
    policy = Policy.of(own.host, key, own.allowed_hosts, own.cors_origins)
    check_allowed(own, has_key=key is not None)
    if own.runs != ServeSpec().runs and not expanded(own.runs).is_dir():
        raise UserError(f"there is no folder {own.runs}; --runs names the folder of your runs")
    with closing(listening_socket(own.host, own.port)) as listener:
        from swlora.web.service import load_service  # takes seconds, unlike what is checked above

        service = _in_a_thread(load_service, spec, make_progress())
        configure_logging()
        print(f"serving http://{shown_address(listener)} (Ctrl-C stops)", flush=True)
        with _signals_are_over():
            Server(service, policy).run(sockets=[listener])


def _in_a_thread(load: Callable[..., "Service"], *arguments: Any) -> "Service":
    """Return what `load` returns or raise what it raises, by a thread that then ends.

    See "One thread computes" in docs/decisions.md. Ctrl-C does not wait for it.
    """
    done: Future[Service] = Future()

    def work() -> None:
        try:
            done.set_result(load(*arguments))
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    return done.result()


class Server(uvicorn.Server):
    """Takes no requests after the first signal, and drops what is left after `DRAIN_S`."""

    def __init__(self, service: "Service", policy: Policy) -> None:
        from swlora.web.app import create_app

        self._service = service
        config = uvicorn.Config(
            create_app(service, policy),
            http=BoundedProtocol,  # of h11, which bounds the size of headers
            ws="none",
            loop="asyncio",  # also where uvloop is installed: one loop, which the tests run
            log_config=None,
            access_log=False,  # the guard writes one, with what came from clients escaped
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=int(DRAIN_S),
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain."""
        self._service.scheduler.drain(DRAIN_S - CLOSING_S)
        super().handle_exit(sig, frame)


def api_key(spec: ServeSpec) -> str | None:
    """Return the key that clients must send; None where there is none."""
    if spec.api_key is not None:
        return spec.api_key.get_secret_value()
    return os.environ.get(KEY_VARIABLE) or None


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens; UserError, before anything is loaded, where it cannot."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host} is no address: {error.strerror}") from error
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port"
        ) from error
    return listener


def shown_address(listener: socket.socket) -> str:
    """Return host and port for a URL."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def _signals_are_over() -> Iterator[None]:
    """Have nothing happen when uvicorn, after its shutdown, raises the signals that it caught."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {sig: signal.signal(sig, lambda _sig, _frame: None) for sig in signals}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
