"""Numbers about the server for Prometheus, in a registry of their own for every application."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_METHODS = ("GET", "HEAD", "POST", "OPTIONS")


class Metrics:
    """Counters that only grow, and gauges that are read when Prometheus asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "swlora_requests",
            "Requests by route and status",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "swlora_request_seconds",
            "Time until a response was complete",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._first_token = Histogram(
            "swlora_first_token_seconds",
            "Time from a request to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "swlora_tokens", "Tokens of prompts and answers", ["kind"], registry=self.registry
        )
        self._texts = Counter(
            "swlora_texts", "Texts by how they ended", ["reason"], registry=self.registry
        )

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request; `status` 0 is a client that left before the answer."""
        method = method if method in _METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Note how long a client waited for the first token of a text."""
        self._first_token.observe(seconds)

    def text(self, reason: str, n_prompt_tokens: int, n_tokens: int) -> None:
        """Count one text that has ended."""
        self._texts.labels(reason).inc()
        self._tokens.labels("prompt").inc(n_prompt_tokens)
        self._tokens.labels("generated").inc(n_tokens)

    def watch(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read when it is asked for."""
        Gauge(f"swlora_{name}", description, registry=self.registry).set_function(read)

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
