"""`swlora serve` as a process: how it starts, how it does not, and how it ends."""

import json
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from tests.support.served_process import ROOT, command, environment, started

from swlora.web.server import listening_socket
from swlora.web.variants import PREFILL_TOKENS

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


@pytest.mark.slow
def test_the_process_serves_and_drains_on_sigterm(served_folder, runs, tmp_path):
    with started(tmp_path / "log", "--model", str(served_folder), "--runs", str(runs)) as (
        process,
        url,
    ):
        with httpx2.Client(base_url=url, trust_env=False, timeout=300) as client:
            assert client.get("/health").json() == {"status": "ok"}
            names = [model["id"] for model in client.get("/v1/models").json()["data"]]
            assert names == ["tiny", "second.run", "study/first"]
            assert str(served_folder.parent) not in client.get("/v1/models").text
            body = {
                "model": "tiny",
                "prompt": "Hello",
                "max_tokens": 300,
                "stream": True,
                "seed": 3,
            }
            with client.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                left = [line for line in lines if line]
            assert left[-1] == "data: [DONE]"
            reason = json.loads(left[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
            assert reason in ("stop", "length")  # it was finished
        start_s = time.monotonic()
        assert process.wait(15) == 0
        assert time.monotonic() - start_s < 12
        errors = (tmp_path / "log").read_text()
        assert "Traceback" not in errors
        assert "POST /v1/completions 200" in errors


@pytest.mark.slow
def test_the_original_command_and_ctrl_c(served_folder, tmp_path):
    arguments = ("--model", str(served_folder))
    with started(tmp_path / "log", *arguments, module="web_site.main") as (process, url):
        with httpx2.Client(base_url=url, trust_env=False) as client:
            answer = client.get("/")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/html")
            assert "server" not in answer.headers
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0


def usage(pid: int) -> dict[str, int]:
    """Memory in pages, open files and threads of a process."""
    proc = Path("/proc") / str(pid)
    resident = int((proc / "statm").read_text().split()[1])
    return {
        "pages": resident,
        "files": len(list((proc / "fd").iterdir())),
        "threads": len(list((proc / "task").iterdir())),
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_is_flat_over_two_thousand_requests(served_folder, runs, tmp_path):
    """Texts whole, streamed, left behind and refused, of several variants."""
    arguments = (
        "--model",
        str(served_folder),
        "--runs",
        str(runs),
        "--queue",
        "64",
        "--deadline-s",
        "3600",
    )
    models = ["tiny", "second.run", "study/first"]

    def ask(client: httpx2.Client, number: int) -> int:
        body = {"model": models[number % 3], "prompt": "x" * (number % 90), "max_tokens": 4}
        if number % 7 == 0:
            sides = [{"model": models[number % 3], "zeroed": ["1:mlp.down_proj:7:11"]}]
            page = {"prompt": "Hi", "sides": sides, "max_tokens": 4}
            return client.post("/api/generate", json=page).status_code
        if number % 5 == 0:
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                next(stream.iter_lines())  # and away
            return stream.status_code
        if number % 11 == 0:
            body["max_tokens"] = 10**6
        return client.post("/v1/completions", json=body).status_code

    with started(tmp_path / "log", *arguments) as (process, url):
        with (
            httpx2.Client(base_url=url, trust_env=False, timeout=300) as client,
            ThreadPoolExecutor(4) as pool,
        ):
            # Kernels are made once for every number of tokens that is run at once.
            for n_tokens in range(1, PREFILL_TOKENS + 1):
                for model in models:
                    body = {"model": model, "prompt": "x" * n_tokens, "max_tokens": 2}
                    assert client.post("/v1/completions", json=body).status_code == 200
            list(pool.map(lambda number: ask(client, number), range(600)))
            before = usage(process.pid)
            statuses = list(pool.map(lambda number: ask(client, number), range(2000)))
            assert set(statuses) == {200, 400}
            after = usage(process.pid)
        assert after["pages"] < 1.05 * before["pages"]
        assert after["files"] <= before["files"] + 5
        assert after["threads"] <= before["threads"] + 5  # of the pool that reads folders


def refused(*arguments: str, **variables: str) -> str:
    """The one line that a server that cannot start says."""
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


def test_what_cannot_start_says_so_in_one_line(tmp_path):
    """And before the model is loaded: there is none of that name."""
    with listening_socket("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refused("--model", "nosuch/model", "--port", port)
    assert "SWLORA_API_KEY" in refused("--host", "0.0.0.0")
    short = refused("--host", "0.0.0.0", SWLORA_API_KEY="tooshort")
    assert "16 printable ASCII" in short and "tooshort" not in short
    assert "no folder" in refused("--runs", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_an_address_of_somewhere_else_is_refused(host, monkeypatch):
    from swlora.errors import UserError

    def lookup(name, *_arguments, **_more):
        if name.endswith("invalid"):
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(UserError, match=host):
        listening_socket(host, 0)


def test_the_thread_that_loaded_the_model_is_gone_when_texts_are_written(monkeypatch):
    """Its OpenMP helpers would count beside those of the model's thread, and slow each product."""
    from swlora.config import RunSpec, ServeSpec
    from swlora.progress import Silent
    from swlora.web import server, service

    loaders: list[threading.Thread] = []

    class NoServer:
        def __init__(self, loaded: object, _policy: object) -> None:
            assert loaded == "service"

        def run(self, sockets: list[socket.socket]) -> None:
            assert len(sockets) == 1
            assert not loaders[0].is_alive()

    def load(*_arguments: object) -> str:
        loaders.append(threading.current_thread())
        return "service"

    monkeypatch.setattr(service, "load_service", load)
    monkeypatch.setattr(server, "Server", NoServer)
    monkeypatch.setattr(server, "configure_logging", lambda: None)
    server.serve(RunSpec(serve=ServeSpec(port=0)), Silent)
    assert len(loaders) == 1


def test_a_model_that_cannot_be_loaded_says_why(monkeypatch):
    from swlora.config import RunSpec, ServeSpec
    from swlora.errors import UserError
    from swlora.progress import Silent
    from swlora.web import server, service

    def load(*_arguments: object) -> None:
        raise UserError("no such model")

    monkeypatch.setattr(service, "load_service", load)
    with pytest.raises(UserError, match="no such model"):
        server.serve(RunSpec(serve=ServeSpec(port=0)), Silent)
