"""What stands before every route: who may ask, from where, how much, and what browsers may do.

A request passes when its headers are few and single, its Host is one of ours (a name that an
attacker points at this machine is not), its key is right, a POST comes from our own pages or from
no page at all, and its body is small and arrives in time. The body is read here, whole, so what a
route can still receive is only that the client has left.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swlora.errors import UserError
from swlora.web.problems import ApiError
from swlora.web.prometheus import Metrics

MAX_BODY_BYTES = 512 * 1024  # a list of prompts, or a long one in four-byte characters
MAX_HEADER_BYTES = 16 * 1024
MAX_HEADERS = 100
BODY_TIMEOUT_S = 10.0
MIN_KEY_CHARACTERS = 16
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
SINGLE_HEADERS = ("host", "content-length", "content-type", "origin", "authorization")
READING_METHODS = ("GET", "HEAD", "OPTIONS")
JSON_TYPE = "application/json"
FORM_TYPE = "application/x-www-form-urlencoded"
API_PREFIXES = ("/v1/", "/api/")
OPEN_PATHS = ("/health",)
OWN_PAGES = "/train"  # what is posted here comes from no other site, allowed or not

# No referrer policy of "no-referrer": with it, browsers would send "Origin: null" from our forms.
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}

access_log = logging.getLogger("swlora.web.access")


@dataclass(frozen=True)
class Policy:
    """Who may ask. `hosts` are lower-case names without a port; `api_key` None asks for no key."""

    hosts: frozenset[str] = frozenset(LOOPBACK_NAMES)
    api_key: str | None = field(default=None, repr=False)
    cors_origins: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        host: str,
        api_key: str | None,
        allowed_hosts: Sequence[str] = (),
        cors_origins: Sequence[str] = (),
    ) -> "Policy":
        """Build the policy of a server that listens on `host`.

        Raises UserError where it would be open to the network without a key.
        """
        if not is_loopback(host) and api_key is None:
            raise UserError(
                f"--host {host} can be reached from other machines: set SWLORA_API_KEY (or "
                "--api-key) to a secret that every client must send, or listen on 127.0.0.1"
            )
        if api_key is not None and not (
            len(api_key) >= MIN_KEY_CHARACTERS and api_key.isascii() and api_key.isprintable()
        ):
            raise UserError(
                f"the API key must have {MIN_KEY_CHARACTERS} printable ASCII characters or more; "
                "'openssl rand -hex 32' makes one"
            )
        for origin in cors_origins:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or f"{parts.scheme}://{parts.netloc}" != origin
            ):
                raise UserError(f"{origin!r} is no origin such as https://example.org")
        own = f"[{host}]" if ":" in host else host
        hosts = frozenset(name.lower() for name in (*LOOPBACK_NAMES, own, *allowed_hosts))
        return cls(hosts, api_key, frozenset(cors_origins))


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, policy: Policy, metrics: Metrics) -> None:
        self.app, self.policy, self.metrics = app, policy, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass or answer it, add headers to the response, note both."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        start_s, status = time.perf_counter(), 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            check(scope, self.policy)
            body = await _read_body(receive)
        except ApiError as error:
            await error.response()(scope, receive, send_guarded)
        else:
            if body is not None:
                await self.app(scope, _replay(body, receive), send_guarded)
        finally:
            self._note(scope, status, time.perf_counter() - start_s)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.request(route, scope["method"], status, seconds)
        shown = scope["path"][:200].encode("unicode_escape").decode()
        access_log.info("%s %s %d %.0f ms", scope["method"][:10], shown, status, 1000 * seconds)


def check(scope: Scope, policy: Policy) -> None:
    """Raise ApiError where a request may not pass, judged by its first line and its headers."""
    headers = _headers(scope)
    _check_host(headers, policy)
    if scope["path"] not in OPEN_PATHS and not _is_preflight(scope, policy):
        _check_key(headers, policy)
    if scope["method"] not in READING_METHODS:
        _check_sender(scope["path"], headers, policy)
        _check_type(scope["path"], headers)
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise ApiError(400, "the Content-Length is not a number")
    if len(length) > 9 or int(length) > MAX_BODY_BYTES:
        raise _too_large()


def _headers(scope: Scope) -> dict[str, str]:
    raw = scope["headers"]
    if len(raw) > MAX_HEADERS or sum(len(k) + len(v) for k, v in raw) > MAX_HEADER_BYTES:
        raise ApiError(431, f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES // 1024} KiB")
    headers: dict[str, str] = {}
    for key, value in raw:
        name = key.decode("latin-1").lower()
        if name in headers and name in SINGLE_HEADERS:
            raise ApiError(400, f"the header {name} was given twice")
        headers[name] = value.decode("latin-1").strip()
    return headers


def _check_host(headers: dict[str, str], policy: Policy) -> None:
    host = headers.get("host", "").lower()
    name, colon, port = host.rpartition(":")
    if not colon or "]" in port:  # no port; the colons of [::1] are not before one
        name, port = host, ""
    if name not in policy.hosts or (port and not port.isdecimal()):
        raise ApiError(
            400, "this Host is not served here; --allowed-hosts names more", code="unknown_host"
        )


def _is_preflight(scope: Scope, policy: Policy) -> bool:
    """Browsers ask without a key whether another site may ask with one."""
    return scope["method"] == "OPTIONS" and bool(policy.cors_origins)


def _check_key(headers: dict[str, str], policy: Policy) -> None:
    if policy.api_key is None:
        return
    scheme, _, value = headers.get("authorization", "").partition(" ")
    given = value.strip()
    if scheme.lower() == "basic":  # what browsers send: any user name, the key as the password
        try:
            given = base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
        except (binascii.Error, ValueError):
            given = ""
    elif scheme.lower() != "bearer":
        given = ""
    if not hmac.compare_digest(given.encode("utf-8"), policy.api_key.encode("utf-8")):
        raise ApiError(
            401,
            "the API key is missing or wrong: send 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"www-authenticate": 'Basic realm="swlora", charset="UTF-8"'},
        )


def _check_sender(path: str, headers: dict[str, str], policy: Policy) -> None:
    """Refuse what a browser sends on behalf of another site; programs send neither header."""
    origin = headers.get("origin")
    if origin in policy.cors_origins and not path.startswith(OWN_PAGES):
        return
    site = headers.get("sec-fetch-site", "same-origin")
    ours = [f"{scheme}://{headers['host']}" for scheme in ("http", "https")]
    if site not in ("same-origin", "none") or (origin is not None and origin not in ours):
        raise ApiError(403, "requests from other sites are refused", code="foreign_origin")


def _check_type(path: str, headers: dict[str, str]) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_api = path.startswith(API_PREFIXES)
    if kind == JSON_TYPE or (kind == FORM_TYPE and not is_api):
        return
    wanted = JSON_TYPE if is_api else f"{JSON_TYPE} or a form"
    raise ApiError(415, f"the Content-Type must be {wanted}", code="unsupported_type")


def _too_large() -> ApiError:
    message = f"the body exceeds {MAX_BODY_BYTES // 1024} KiB"
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


async def _read_body(receive: Receive) -> bytes | None:
    """Return the whole body, or None where the client left; ApiError where it is large or late."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        late = f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"
        raise ApiError(408, late, headers={"connection": "close"}) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once; after that, only news of the connection."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
