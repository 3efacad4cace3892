"""What a person does on the page that trains, as a program; and data to train on."""

import json
import re
from pathlib import Path

import psutil

HTML = {"accept": "text/html"}
ROWS = [{"prompt": f"{k}: ", "completion": "yes"} for k in range(6)]


def start(client, status=303, **fields) -> str:
    """Start a training; return where it leads, or what it says."""
    form = {"data": "rows.jsonl", "name": "mine", "epochs": "2"} | fields
    answer = client.post("/train/start", data=form, headers=HTML)
    assert answer.status_code == status, answer.text
    return answer.headers.get("location", answer.text)


def estimate(client, hold: Path, **fields) -> tuple[str, str]:
    """Ask for an estimate; return where it is shown, and the page, which is there before it.

    It is held for as long as there is a file `hold`, beside the stand-in.
    """
    hold.touch()
    page = start(client, 200, action="estimate", **fields)
    (url,) = re.findall(r'data-live="(/train/estimate\?key=\w+)"', page)
    return url, page


def press(client, action, run="mine", status=303, **fields) -> str:
    answer = client.post(f"/train/{action}", data={"run": run} | fields)
    assert answer.status_code == status, answer.text
    return answer.text


def status_of(runs: Path, name: str = "mine") -> str:
    try:
        return str(json.loads((runs / name / "run.json").read_text())["status"])
    except FileNotFoundError:
        return ""


def is_gone(process: psutil.Process) -> bool:
    """Say whether a process that is nobody's child any more has ended."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
