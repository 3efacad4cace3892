"""A training from the page outlives its server: all of it with real processes and a tiny model."""

import json
import re
import signal
from pathlib import Path

import httpx2
import pytest
from tests.support.served_process import started
from tests.support.servers import until
from tests.support.small_runs import write_data

pytestmark = [pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1"])]


def test_a_killed_server_leaves_a_training_that_the_next_one_stops_and_resumes(
    served_folder, tmp_path
):
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
    write_data(tmp_path / "data")
    run = tmp_path / "runs/mine"
    flags = ("--model", str(served_folder), "--dtype", "float32", "--runs", str(tmp_path / "runs"))
    flags += ("--allow-training", "--data-folder", str(tmp_path / "data"))
    with started(tmp_path / "first.log", *flags) as (server, url):
        form = {"data": "train.jsonl", "name": "mine", "epochs": "1000", "layers": "last:2"}
        assert post(url, "start", form) == "/runs/mine"
        until(lambda: n_steps(run) > 2, 120)
        server.send_signal(signal.SIGKILL)
        server.wait()
        before = n_steps(run)
        until(lambda: n_steps(run) > before, 60)
    with started(tmp_path / "second.log", *flags) as (_, url):
        page = httpx2.get(f"{url}/runs/mine", trust_env=False).text
        assert "It trains in a process of its own" in page
        post(url, "stop", {"run": "mine"})
        until(lambda: facts(run)["status"] == "cancelled", 60)
        n_stopped = n_steps(run)
        assert n_stopped < planned(run)
        until(lambda: "Resume" in httpx2.get(f"{url}/runs/mine", trust_env=False).text, 60)
        post(url, "resume", {"run": "mine"})
        until(lambda: n_steps(run) > n_stopped, 120)
        post(url, "stop", {"run": "mine"})
        until(lambda: facts(run)["status"] == "cancelled", 60)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [step for step in steps if step]
    assert losses == sorted(losses)  # it went on, and did not begin again
    assert "Traceback" not in (run / "log.txt").read_text()


def post(url: str, action: str, form: dict[str, str]) -> str:
    """Press a button of the page; return where it leads."""
    answer = httpx2.post(f"{url}/train/{action}", data=form, trust_env=False)
    assert answer.status_code == 303, answer.text
    return str(answer.headers["location"])


def n_steps(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def facts(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "run.json").read_text())
    return found


def planned(run: Path) -> int:
    (n,) = re.findall(r"^steps: ([\d,]+) an epoch", (run / "log.txt").read_text(), re.M)
    return 1000 * int(n.replace(",", ""))
