"""A tiny model behind the web server: in the test's own loop, or on a loopback socket."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.support import fake_training, servers
from tests.support.adapters import attach, randomise
from tests.support.data_files import write_rows
from tests.support.fake_host import FakeHost
from tests.support.page_training import ROWS

from swlora.adapters.saved import save_adapter
from swlora.config import AdapterSpec, ModelSpec, RunSpec, ServeSpec
from swlora.files import write_json
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.models.load import LoadedModel, load_model
from swlora.web.app import create_app
from swlora.web.guard import Guard, Policy
from swlora.web.scheduler import Scheduler
from swlora.web.service import make_service
from swlora.web.tickets import Limits
from swlora.web.training.desk import TrainingDesk
from swlora.web.training.worker import Worker

BASE = "tiny"
ZEROED = WeightAddress(1, "mlp.down_proj", 7, 11)
LARGE = 40.0  # the weight there: without it, the model says something else


@pytest.fixture(scope="session")
def served_folder(make_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """The folder of a model with one large weight."""
    folder = tmp_path_factory.mktemp("served") / BASE
    model = make_model("llama", max_position_embeddings=512)
    Anatomy(model).weight_view(ZEROED).fill_(LARGE)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(served_folder, tmp_path_factory) -> Path:
    """Runs: two trained adapters on different layers, and an identification."""
    root = tmp_path_factory.mktemp("served") / "runs"
    for number, (name, layers) in enumerate({"study/first": [0, 2], "second.run": [1]}.items()):
        folder = root / name
        model = load_model(ModelSpec(name=str(served_folder), dtype="float32")).model
        peft_model = attach(model, AdapterSpec(rank=3), layers, seed=number)
        randomise(peft_model, 0.2, seed=number)
        save_adapter(peft_model, folder / "adapter", {"layers": layers, "separator": "\n"})
        facts = {"status": "done", "command": "train", "started_at": f"2030-01-0{number + 1}"}
        write_json(folder / "run.json", facts)
        rows = [{"step": step, "loss": 3.0 - step} for step in range(3)]
        write_rows(folder / "metrics.jsonl", rows)
        (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = {
        "layer": ZEROED.layer,
        "module": ZEROED.module,
        "out_channel": ZEROED.out_channel,
        "in_channel": ZEROED.in_channel,
        "weight": LARGE,
        "ratio": 7.5,
        "verdict": "strong",
    }
    elsewhere = {**found, "in_channel": 12}  # not the value that this model has there
    write_json(root / "found" / "run.json", {"status": "done", "command": "identify"})
    result = {"identify": {"candidates": [found, elsewhere], "figure": "/home/me/spikes.png"}}
    write_json(root / "found" / "result.json", result)
    return root


@pytest.fixture
def loaded(served_folder) -> LoadedModel:
    """The model, alone in this test."""
    return load_model(ModelSpec(name=str(served_folder), dtype="float32"))


@pytest.fixture
def make(loaded, runs) -> Callable[..., Guard]:
    """A function (policy=..., model=..., **settings of ServeSpec) -> the application."""

    def build(policy: Policy | None = None, model: LoadedModel = loaded, **settings: Any) -> Guard:
        spec = ServeSpec(**{"runs": runs, "max_tokens": 400} | settings)
        return create_app(make_service(spec, model), policy or Policy())

    return build


@pytest.fixture
def browse() -> Callable[[Guard], TestClient]:
    """A function application -> a client in this process, which calls it by an allowed name."""

    def client_of(app: Guard) -> TestClient:
        url = "http://localhost:8000"
        return TestClient(app, base_url=url, raise_server_exceptions=False)

    return client_of


@pytest.fixture
def client(make, browse) -> Iterator[TestClient]:
    """A client of the application, in this process and without a socket."""
    with browse(make()) as client:
        yield client


@pytest.fixture
def own_runs(runs, tmp_path) -> Path:
    """A copy of the runs that a test may change."""
    return shutil.copytree(runs, tmp_path / "runs")


@pytest.fixture
def own_client(make, browse, own_runs, monkeypatch) -> Iterator[TestClient]:
    """A client of an application that sees every change of `own_runs` at once."""
    monkeypatch.setattr("swlora.web.folders.FRESH_S", 0.0)
    monkeypatch.setattr("swlora.web.scheduler.RETRY_S", 0.05)
    with browse(make(runs=own_runs)) as client:
        yield client


@pytest.fixture
def until() -> Callable[..., float]:
    """A function that waits for a condition and returns how long that took."""
    return servers.until


@pytest.fixture
def run_server() -> Callable[..., AbstractContextManager[servers.Running]]:
    """A context manager (service, policy=...) that serves from another thread."""
    return servers.running_server


# Servers that may train, with a stand-in for the child


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder of data: two files that may be chosen, and what may not."""
    folder = tmp_path / "data"
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "more/broken.jsonl", ROWS)
    write_rows(tmp_path / "outside.jsonl", ROWS)
    (folder / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    (folder / "folder.jsonl").mkdir()
    (folder / "elsewhere").symlink_to(tmp_path)
    (folder / ".hidden.jsonl").write_text("{}")
    (folder / "notes.md").write_text("no rows")
    return folder


@pytest.fixture
def child(tmp_path, monkeypatch) -> Path:
    """The note of the stand-in, which is the child from here on."""
    script = shutil.copy(fake_training.__file__, tmp_path / "child.py")
    monkeypatch.setattr("swlora.web.training.desk.SWLORA", (sys.executable, str(script)))
    return tmp_path / "said.json"


@pytest.fixture
def open_app(loaded, data, tmp_path, monkeypatch, child) -> Iterator[Callable[..., TestClient]]:
    """A function (policy=..., instead_of=...) -> a client of a server of the same folders."""
    monkeypatch.setattr("swlora.web.folders.FRESH_S", 0.0)
    monkeypatch.setattr("swlora.web.training.data_folder.FRESH_S", 0.0)
    serve = ServeSpec(runs=tmp_path / "runs", allow_training=True, data_folder=data)
    clients: list[TestClient] = []

    def end(client: TestClient) -> None:
        clients.remove(client)
        client.__exit__(None, None, None)

    def make(policy: Policy | None = None, instead_of: TestClient | None = None) -> TestClient:
        if instead_of is not None:
            end(instead_of)
        desk = TrainingDesk.of(RunSpec(serve=serve), loaded)
        app = create_app(make_service(serve, loaded, None, desk), policy or Policy())
        client = TestClient(app, base_url="http://localhost:8000", follow_redirects=False)
        clients.append(client)
        return client.__enter__()

    yield make
    for job in filter(None, [Worker(tmp_path / "runs").now()]):
        os.kill(job.pid, signal.SIGKILL)
    for client in list(clients):
        end(client)


@pytest.fixture
def trainer(open_app) -> TestClient:
    return open_app()


# Schedulers whose host only counts


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def make_scheduler(host) -> Iterator:
    made = []

    def make(**limits) -> Scheduler:
        standard = {"max_slots": 4, "queue": 8, "deadline_s": 30.0, "cache_tokens": 10_000}
        made.append(Scheduler(host, Limits(**standard | limits)))
        return made[-1]

    yield make
    host.gate.set()
    for scheduler in made:
        if scheduler._thread.is_alive():
            scheduler.stop()
