"""A real server on a loopback socket: clients that leave, the official client, the end."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import openai
import pytest

from swlora.config import ServeSpec
from swlora.web.service import make_service

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
LONG = {"model": "tiny", "temperature": 0, "max_tokens": 400, "prompt": "Hello"}


@pytest.fixture
def endless(loaded):
    """A model whose texts end by their length alone, so that a long one is long."""
    return replace(loaded, end_token_ids=())


@pytest.fixture
def service(endless, runs):
    return make_service(ServeSpec(runs=runs, max_tokens=400, max_rows=2, queue=8), endless)


@pytest.fixture
def running(service, run_server):
    with run_server(service) as running:
        yield running


@pytest.fixture
def slow(service, monkeypatch):
    """Make every step take a moment, and count them."""
    steps = []

    def step(decoder):
        steps.append(time.monotonic())
        time.sleep(0.02)
        return real(decoder)

    from swlora.decoding.batch import BatchDecoder

    real = BatchDecoder.step
    monkeypatch.setattr(BatchDecoder, "step", step)
    return steps


def send(running, path: str, body: dict) -> socket.socket:
    """Send a request over a connection of its own; whoever closes it has left."""
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def generate_body(n_sides: int = 1) -> dict:
    sides = [{"model": name} for name in ("tiny", "second.run")[:n_sides]]
    return {"prompt": "Hello", "sides": sides, "max_tokens": 400, "temperature": 0}


PHASES = {
    "streaming": ("/v1/completions", {**LONG, "stream": True}),
    "not streaming": ("/v1/completions", LONG),
    "chat": (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 400,
            "stream": True,
        },
    ),
    "page": ("/api/generate", generate_body()),
    "beside each other": ("/api/generate", generate_body(2)),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_stops_its_text(running, slow, until, phase):
    scheduler = running.service.scheduler
    connection = send(running, *PHASES[phase])
    until(lambda: len(slow) > 5)
    connection.close()
    assert until(lambda: scheduler.n_active == 0) < 1
    n_steps = len(slow)
    time.sleep(0.2)
    assert len(slow) == n_steps < 200


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_the_queue_frees_its_place(running, slow, until, phase):
    scheduler = running.service.scheduler
    busy = send(running, "/api/generate", generate_body(2))
    until(lambda: scheduler.n_active == 2)
    waiting = send(running, *PHASES[phase])
    until(lambda: scheduler.n_waiting > 0)
    waiting.close()
    assert until(lambda: scheduler.n_waiting == 0) < 1
    assert scheduler.n_active == 2
    busy.close()
    until(lambda: scheduler.n_active == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_the_prompt_stops_it(running, slow, until, monkeypatch, stream):
    """The prompt is run in stretches of two tokens here: 300 steps, of which few are taken."""
    monkeypatch.setattr("swlora.web.variants.PREFILL_TOKENS", 2)
    body = {**LONG, "prompt": "x" * 500, "max_tokens": 5, "stream": stream}
    connection = send(running, "/v1/completions", body)
    until(lambda: len(slow) > 3)
    connection.close()
    assert until(lambda: running.service.scheduler.n_active == 0) < 1
    assert len(slow) < 100


def test_health_answers_while_texts_are_written(running, slow):
    connections = [send(running, "/v1/completions", LONG) for _ in range(4)]
    with running.client() as client:
        for _ in range(50):
            assert client.get("/health").json() == {"status": "ok"}
    for connection in connections:
        connection.close()


def test_fifty_at_once_are_served_or_told_to_come_back(running, slow):
    def ask(number: int) -> httpx2.Response:
        body = {**LONG, "max_tokens": 3, "prompt": f"number {number}", "stream": number % 2 == 0}
        with running.client() as client:
            return client.post("/v1/completions", json=body)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 10  # two rows and eight places
    for answer in answers:
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert answer.json()["error"]["type"] == "rate_limit_error"
        else:
            assert "length" in answer.text
    assert running.service.scheduler.n_active == 0


def test_a_request_that_takes_too_long_is_ended(endless, runs, run_server, slow):
    spec = ServeSpec(runs=runs, deadline_s=0.4)
    with run_server(make_service(spec, endless)) as running, running.client() as client:
        answer = client.post("/v1/completions", json=LONG)
        assert answer.status_code == 408
        assert answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["code"] == "deadline"
        streamed = client.post("/v1/completions", json={**LONG, "stream": True})
        *_, last, done = [line for line in streamed.text.split("\n") if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline"
        assert done == "data: [DONE]"


def test_slow_connections_do_not_hold_up_others(running):
    host, port = running.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(100)]
    for connection in idle[:50]:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-")
    start_s = time.monotonic()
    with running.client() as client:
        assert client.get("/health").status_code == 200
    assert time.monotonic() - start_s < 5
    for connection in idle:
        connection.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
        b"GET /%00\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\r\n\r\n\r\n",
    ],
)
def test_broken_http_is_a_4xx(running, raw):
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(raw + b"\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 4")
    with running.client() as client:
        assert client.get("/health").status_code == 200


def test_draining_ends_well(service, run_server, slow, until):
    """What is under way ends in time, what comes is refused, and the thread is gone."""
    with run_server(service) as running:
        short = send(running, "/v1/completions", {**LONG, "max_tokens": 20})
        until(lambda: len(slow) > 2)
        long = send(running, "/v1/completions", {**LONG, "stream": True})
        until(lambda: service.scheduler.n_active == 2)
        service.scheduler.drain(1.0)
        with running.client() as client:
            refused = client.post("/v1/completions", json=LONG)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
            assert client.get("/ready").status_code == 503
            assert client.get("/health").status_code == 200
        assert b'"finish_reason":"length"' in read_all(short)
        said = read_all(long)
        assert b"shutting down" in said and said.rstrip().endswith(b"0")
        assert b"[DONE]" in said
    assert not service.scheduler.is_ready


def read_all(connection: socket.socket) -> bytes:
    """Read an answer until nothing more comes for a moment."""
    connection.settimeout(3)
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
            if data.endswith(b"0\r\n\r\n") or b'"total_tokens"' in data:
                break
    except TimeoutError:
        pass
    connection.close()
    return data


# The official client


@pytest.fixture
def official(running):
    client = openai.OpenAI(
        base_url=f"{running.url}/v1",
        api_key="none needed",
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    with client:
        yield client


def test_the_official_client_lists_models(official):
    assert [model.id for model in official.models.list()] == ["tiny", "second.run", "study/first"]
    assert official.models.retrieve("study/first").owned_by == "swlora"


def test_the_official_client_completes(official):
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 12, "temperature": 0}
    whole = official.completions.create(**asked, logprobs=2)
    assert whole.usage.completion_tokens == 12
    assert len(whole.choices[0].logprobs.tokens) == 12
    stream = official.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(p.choices[0].text for p in pieces[:-1]) == whole.choices[0].text
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage == whole.usage


def test_the_official_client_chats(official):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    asked = {"model": "second.run", "messages": turns, "max_tokens": 12, "temperature": 0}
    whole = official.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].logprobs.content) == 12
    pieces = list(official.chat.completions.create(**asked, stream=True))
    text = "".join(p.choices[0].delta.content or "" for p in pieces)
    assert text == whole.choices[0].message.content


def test_the_official_client_understands_refusals(official):
    with pytest.raises(openai.NotFoundError, match="no such model"):
        official.completions.create(model="gpt-4", prompt="Hi")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        official.completions.create(model="tiny", prompt="Hi", temperature=9)
    with pytest.raises(openai.BadRequestError, match="no such field"):
        official.completions.create(model="tiny", prompt="Hi", extra_body={"best": 3})


def test_the_official_client_that_leaves_a_stream_stops_it(official, running, slow, until):
    stream = official.completions.create(**LONG, stream=True)
    next(iter(stream))
    stream.close()
    assert until(lambda: running.service.scheduler.n_active == 0) < 1


def test_streams_from_many_clients_stay_apart(running, loaded):
    def ask(prompt: str, stream: bool) -> str:
        body = {**LONG, "prompt": prompt, "max_tokens": 30, "stream": stream}
        with running.client() as client:
            answer = client.post("/v1/completions", json=body)
        if not stream:
            return answer.json()["choices"][0]["text"]
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line][:-1]
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines)

    prompts = [f"prompt {i} " * (1 + i % 3) for i in range(6)]
    alone = [ask(prompt, stream=False) for prompt in prompts]
    assert len(set(alone)) == 6
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda prompt: ask(prompt, stream=True), prompts))
    assert together == alone


def test_the_threads_are_gone_afterwards(service, run_server):
    before = set(threading.enumerate())
    with run_server(service) as running, running.client() as client:
        client.post("/v1/completions", json={**LONG, "max_tokens": 2})
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not any(name.startswith("swlora") for name in left)
