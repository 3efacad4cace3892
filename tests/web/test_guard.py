"""Who may ask, for every route there is: keys, hosts, origins, types, sizes, headers."""

import base64
import json
import logging

import pytest

from swlora.errors import UserError
from swlora.web.guard import MAX_BODY_BYTES, Guard, Policy
from swlora.web.logs import EscapingFormatter
from swlora.web.prometheus import Metrics

KEY = "k" * 20
OPEN = {"/health"}


def routes(client):
    """(method, path) of every route; parameters in paths are filled with something."""
    found = [
        (method, getattr(route, "path", "").replace("{name:path}", "tiny"))
        for route in all_routes(client.app.app.routes)
        for method in route.methods
    ]
    assert len(found) > 15
    return found


def all_routes(found):
    for route in found:
        router = getattr(route, "original_router", None)  # how FastAPI keeps included ones
        yield from [route] if router is None else all_routes(router.routes)


def error(response) -> dict:
    """The error in OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def ask(client, method, path, **options):
    if method == "POST" and "content" not in options:
        options["json"] = {}
    return client.request(method, path, **options)


def test_only_health_is_open_where_a_key_is_asked_for(make, browse):
    with browse(make(Policy(api_key=KEY))) as client:
        for method, path in routes(client):
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": f"Bearer {KEY}x"},
                {"authorization": f"Digest {KEY}"},
                {"authorization": KEY},
                {"authorization": "Basic !!!"},
                {"authorization": "Basic " + base64.b64encode(b"me:wrong").decode()},
            ):
                response = ask(client, method, path, headers=headers)
                assert (response.status_code == 401) == (path not in OPEN), (method, path)
                if response.status_code == 401 and method != "HEAD":
                    assert error(response)["type"] == "authentication_error"
            basic = "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()
            for right in (f"Bearer {KEY}", basic):
                response = ask(client, method, path, headers={"authorization": right})
                assert response.status_code != 401, (method, path)


@pytest.mark.parametrize(
    ("host", "is_served"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:1", True),
        ("[::1]", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost:evil", False),
        ("", False),
        ("::1", False),
        ("localhost, evil.example", False),
    ],
)
def test_every_route_answers_to_its_own_names_only(client, host, is_served):
    for method, path in routes(client):
        response = ask(client, method, path, headers={"host": host})
        refused = response.status_code == 400 and (
            method == "HEAD" or error(response)["code"] == "unknown_host"
        )
        assert refused != is_served, (method, path)


@pytest.mark.parametrize(
    ("headers", "is_refused"),
    [
        ({}, False),
        ({"origin": "http://localhost:8000"}, False),
        ({"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"origin": "null"}, True),
        ({"origin": "http://evil.example"}, True),
        ({"origin": "http://localhost:3000"}, True),
        ({"origin": "http://localhost:8000.evil.example"}, True),
        ({"sec-fetch-site": "cross-site"}, True),
        ({"sec-fetch-site": "same-site"}, True),
        ({"origin": "http://localhost:8000", "sec-fetch-site": "cross-site"}, True),
    ],
)
def test_a_post_comes_from_our_own_pages_or_from_no_page(client, headers, is_refused):
    for method, path in routes(client):
        response = ask(client, method, path, headers=headers)
        assert (response.status_code == 403) == (is_refused and method == "POST"), (method, path)
        assert "access-control-allow-origin" not in response.headers


def test_a_named_site_may_call_with_its_origin(make, browse):
    site = "https://friend.example"
    with browse(make(Policy(api_key=KEY, cors_origins=frozenset({site})))) as client:
        asked = {"origin": site, "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization"
        preflight = client.options("/v1/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == site
        foreign = client.options(
            "/v1/completions", headers={**asked, "origin": "http://evil.example"}
        )
        assert "access-control-allow-origin" not in foreign.headers
        keyed = {"authorization": f"Bearer {KEY}", "sec-fetch-site": "cross-site"}
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
        answer = client.post("/v1/completions", json=body, headers={**keyed, "origin": site})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == site
        assert client.post("/v1/completions", json=body, headers=keyed).status_code == 403


@pytest.mark.parametrize("kind", ["text/plain", "", "application/xml", "multipart/form-data"])
def test_a_post_of_another_type_is_refused(client, kind):
    for method, path in routes(client):
        if method == "POST":
            response = ask(client, method, path, content=b"{}", headers={"content-type": kind})
            assert response.status_code == 415, path


def test_the_api_takes_no_forms(client):
    form = {"content-type": "application/x-www-form-urlencoded"}
    for method, path in routes(client):
        if method == "POST":
            response = ask(client, method, path, content=b"model=tiny", headers=form)
            assert (response.status_code == 415) == path.startswith(("/v1/", "/api/")), path


def test_large_bodies_are_refused_with_and_without_a_length(client):
    body = json.dumps({"prompt": "x" * MAX_BODY_BYTES}).encode()

    def chunks():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    for method, path in routes(client):
        headers = {"content-type": "application/json"}
        for content in (body, chunks()):
            response = client.request(method, path, content=content, headers=headers)
            assert response.status_code == 413, (method, path)
        for length in ("-1", "1e3", "9" * 5000, "0x10", ""):
            wrong = {**headers, "content-length": length}
            response = client.request(method, path, content=b"{}", headers=wrong)
            assert response.status_code in (400, 413), length


def test_many_or_large_or_double_headers_are_refused(client):
    assert client.get("/health", headers={"x-large": "x" * 17_000}).status_code == 431
    many = {f"x-{i}": "1" for i in range(101)}
    assert client.get("/health", headers=many).status_code == 431
    for name in ("host", "origin", "authorization", "content-type"):
        double = [(name, "localhost"), (name, "localhost")]
        assert client.get("/health", headers=double).status_code == 400, name


def test_every_answer_has_the_headers_that_bind_a_browser(client):
    asked = [("GET", "/nowhere"), ("DELETE", "/v1/models"), ("TRACE", "/"), *routes(client)]
    for method, path in asked:
        headers = ask(client, method, path).headers
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "same-origin"


def test_other_methods_and_paths_are_told_so(client):
    for method, path, status in [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/../api/models/%2e%2e", 404),
        ("DELETE", "/v1/models", 415),
        ("PUT", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("GET", "/v1/completions", 405),
    ]:
        options = {"json": {}} if method == "PUT" else {}
        response = client.request(method, path, **options)
        assert response.status_code == status, (method, path)
        error(response)


def test_a_client_that_leaves_while_it_sends_gets_no_answer():
    import anyio

    sent = []
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}

    async def app(*_arguments):
        raise AssertionError("the application was called")

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    anyio.run(Guard(app, Policy(), Metrics()), scope, receive, send)
    assert sent == []


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    import anyio

    monkeypatch.setattr("swlora.web.guard.BODY_TIMEOUT_S", 0.05)
    sent = []
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}

    async def app(*_arguments):
        raise AssertionError("the application was called")

    async def receive():
        await anyio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    anyio.run(Guard(app, Policy(), Metrics()), scope, receive, send)
    assert sent[0]["status"] == 408


# The start


NETWORK_HOSTS = {name: name for name in ("0.0.0.0", "192.168.1.5", "example.org")}
NETWORK_HOSTS |= {"::": "[::]", "2001:db8::7": "[2001:db8::7]"}


@pytest.mark.parametrize(("host", "asked_for"), NETWORK_HOSTS.items())
def test_no_server_is_open_to_the_network_without_a_key(host, asked_for):
    with pytest.raises(UserError, match="SWLORA_API_KEY"):
        Policy.of(host, None)
    assert asked_for in Policy.of(host, KEY).hosts


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    assert Policy.of(host, None).api_key is None


@pytest.mark.parametrize("key", ["short", "", "with a line\nbreak in it", "é" * 20])
def test_a_key_that_is_none_is_refused(key):
    with pytest.raises(UserError, match="16 printable ASCII"):
        Policy.of("127.0.0.1", key)


@pytest.mark.parametrize("origin", ["*", "example.org", "https://example.org/", "null"])
def test_an_origin_that_is_none_is_refused(origin):
    with pytest.raises(UserError, match="no origin"):
        Policy.of("127.0.0.1", None, cors_origins=[origin])


def test_a_policy_shows_no_key():
    assert KEY not in repr(Policy(api_key=KEY))


# The log


def test_nothing_from_a_client_makes_a_line_of_its_own(client, caplog):
    caplog.set_level(logging.INFO, "swlora.web.access")
    client.get("/v1/models/a%0d%0aINFO%20root%20logged%20in%1b[31m")
    client.post("/v1/completions", json={"model": "x\ny", "prompt": "SECRET PROMPT"})
    lines = [EscapingFormatter("%(message)s").format(record) for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith(r"GET /v1/models/a\r\nINFO root logged in\x1b[31m 404 ")
    assert not any("\n" in line or "SECRET" in line for line in lines)


def test_keys_are_not_logged(make, browse, caplog):
    caplog.set_level(logging.DEBUG)
    with browse(make(Policy(api_key=KEY))) as client:
        client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
        client.get("/v1/models", headers={"authorization": "Bearer another-key-of-20"})
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "GET /v1/models 401" in said
    assert KEY not in said
    assert "another-key" not in said


def test_the_lines_of_a_traceback_stay_below_their_record():
    try:
        raise ValueError("bad\r\nINFO root logged in")
    except ValueError as problem:
        record = logging.LogRecord(
            "x", 40, "f", 1, "failed", (), (type(problem), problem, problem.__traceback__)
        )
    first, *rest = EscapingFormatter("%(message)s").format(record).split("\n")
    assert first == "failed"
    assert all(line.startswith("    ") for line in rest)
    assert "\r" not in "".join(rest)
