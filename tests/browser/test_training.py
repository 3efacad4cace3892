"""A person trains from the page: looks at data, starts, stops, goes on, talks with the result."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.support.data_files import write_rows
from tests.support.served_process import served
from tests.support.servers import until

from swlora.web.training.worker import NOTE, Worker

pytestmark = [pytest.mark.browser, pytest.mark.allow_hosts(["127.0.0.1"])]
SIZES = {"phone": (375, 740), "desktop": (1280, 850)}
CHATS = [
    [{"role": "user", "content": f"Order {k}?"}, {"role": "assistant", "content": "On its way."}]
    for k in range(12)
]


@pytest.fixture(scope="module")
def training_runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("training") / "runs"


@pytest.fixture(scope="module")
def server(chromium, model, training_runs, tmp_path_factory) -> Iterator[str]:
    """The address of a server that may train."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "data").mkdir()
    write_rows(folder / "data/chats.jsonl", [{"messages": chat} for chat in CHATS])
    questions = [{"question": f"{k} + 1?", "answer": f"{k + 1}"} for k in range(1, 30)]
    write_rows(folder / "data/questions.jsonl", questions)
    training_runs.mkdir()
    flags = {"--model": model, "--runs": training_runs, "--data-folder": folder / "data"}
    with served(folder / "log", flags, "--allow-training") as address:
        yield address
    if job := Worker(training_runs).now():  # of a test that failed
        os.kill(job.pid, signal.SIGKILL)


@pytest.fixture
def picture(screenshots):
    """A function (page, name) that takes pictures of a state, and sees that nothing is too wide."""

    def take(page: Page, name: str) -> None:
        for size, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width, name
            page.screenshot(full_page=True, path=screenshots / f"train-{name}-{size}.png")

    return take


def test_the_whole_way_from_a_file_to_a_chat(visit, training_runs, picture):
    page = visit("/train")
    picture(page, "choose")
    page.get_by_role("button", name="chats.jsonl").click()
    expect(page.locator("mark").nth(1)).to_contain_text("On its way.")
    expect(page.locator(".tokens").first).to_contain_text("user:Order 0?")
    picture(page, "preview")
    for label, value in {"Layers": "last:2", "Epochs": "100"}.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_text("The training is starting")).to_be_visible()
    picture(page, "starting")
    stop_in_the_middle(page, training_runs / "chats", picture)
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Merge into a model")).to_be_visible()
    lines = (training_runs / "chats/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    numbers = [row["step"] for row in steps if "loss" in row]
    assert numbers == sorted(set(numbers)) and numbers[-1] >= 100
    tries = page.get_by_role("link", name="Try its adapter")
    expect(tries).to_be_visible()
    picture(page, "done")
    tries.click()
    talk_with_both(page)
    picture(page, "chat")
    page.goto("/runs/chats")
    merge_and_export(page, training_runs / "chats", picture)


def stop_in_the_middle(page: Page, run: Path, picture) -> None:
    """Press Stop while the training is held, so that it has not come to its end before."""
    metrics = run / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count('"loss"') > 2, 120)
    pid = json.loads((run.parent / NOTE).read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    expect(page.get_by_role("img", name="Loss")).to_be_visible()
    picture(page, "running")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="End it at once")).to_be_visible()
    picture(page, "stopping")
    os.kill(pid, signal.SIGCONT)
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    expect(page.locator(".state .badge")).to_have_text("cancelled")
    picture(page, "stopped")


def merge_and_export(page: Page, run: Path, picture) -> None:
    """Make a model of the adapter; no .gguf of it, whose tokenizer llama.cpp would not read."""
    page.get_by_role("button", name="Merge into a model").click()
    export = page.get_by_role("button", name="Write as GGUF")
    expect(export).to_be_visible()
    picture(page, "merged")
    assert (run / "merged/model.safetensors").is_file()
    export.click()
    expect(page.locator(".problem")).to_have_text(
        "That did not work: the tokenizer has no merges, and llama.cpp reads none without"
    )
    picture(page, "not-exported")


def talk_with_both(page: Page) -> None:
    """The adapter answers beside the base model."""
    expect(page.get_by_role("heading", level=1)).to_have_text("Chat")
    names = [name.inner_text() for name in page.locator("[data-name]").all()]
    assert names == ["chats", "tiny"]
    page.locator("summary", has_text="Settings").click()
    page.locator("#max_tokens").fill("12")
    page.get_by_label("Message").fill("Order 7?")
    page.get_by_role("button", name="Send").click()
    for side in (0, 1):
        answer = page.locator("[data-turns]").nth(side).locator(".said").nth(1)
        expect(answer).to_have_text(re.compile(r"\S"))
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_columns_are_named_where_they_have_other_names(visit, picture):
    page = visit("/train", refusals=1)  # of a wrong rank
    page.get_by_role("button", name="questions.jsonl").click()
    expect(page.locator(".problem")).to_contain_text("question")
    columns = page.get_by_label("Columns", exact=True)
    expect(columns).to_be_visible()  # since the look failed
    picture(page, "refused")
    columns.fill("prompt=question,completion=answer")
    page.get_by_role("button", name="Look again").click()
    expect(page.locator("mark").nth(1)).to_have_text("2")
    page.get_by_label("Rank").fill("0")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("alert")).to_contain_text("Rank: ")
    expect(page.locator("mark").nth(1)).to_have_text("2")  # the columns are known still
    page = visit("/train", java_script_enabled=False)
    page.get_by_role("button", name="chats.jsonl").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("chats.jsonl")
