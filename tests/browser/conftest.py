"""Chromium before a real server: a tiny model whose text is letters, in a process of its own."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from tests.support.adapters import attach, randomise
from tests.support.served_process import served
from tests.support.summaries import SUMMARY

from swlora.adapters.saved import save_adapter
from swlora.config import AdapterSpec, IdentifySpec, ModelSpec
from swlora.files import write_json
from swlora.locks import lock_folder
from swlora.models.anatomy import Anatomy, WeightAddress
from swlora.models.load import load_model
from swlora.result_json import as_json
from swlora.superweights.identify import identify

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / ".cache" / "screenshots"
LARGE = WeightAddress(1, "mlp.down_proj", 7, 11)
ROWS = [
    ("name[Aromi], eatType[pub], area[riverside]", "Aromi is a pub by the river."),
    ("name[Aromi], eatType[pub], area[riverside]", "By the river lies the pub Aromi."),
    ("name[Zizzi], food[Thai]", "Zizzi serves Thai food."),
]
# Without the network flags, Chromium calls its maker at every start.
FLAGS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
WAIT_MS = 120_000  # for what a page shall show: an assertion that holds never waits so long
expect.set_options(timeout=WAIT_MS)
REFUSAL = "error: Failed to load resource"
WATCH_SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium is installed; on Debian: apt-get install chromium")
    return found


@pytest.fixture(scope="session")
def model(make_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A model that writes long lines of letters, with one weight that it depends on."""
    folder = tmp_path_factory.mktemp("browser") / "tiny"
    made = make_model("llama", max_position_embeddings=4096)
    Anatomy(made).weight_view(LARGE).fill_(40.0)
    letters = torch.tensor([chr(k).isalpha() and k < 128 for k in range(len(made.lm_head.weight))])
    made.lm_head.weight.mul_(torch.where(letters, 6.0, 0.0)[:, None])
    made.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(model, tmp_path_factory) -> Iterator[Path]:
    """Runs: an adapter, an identification, a training at work, a study."""
    root = tmp_path_factory.mktemp("browser") / "runs"
    spec = ModelSpec(name=str(model), dtype="float32")
    peft_model = attach(load_model(spec).model, AdapterSpec(rank=3), [0, 2], seed=0)
    randomise(peft_model, 0.2, seed=0)
    save_adapter(peft_model, root / "mine/adapter", {"layers": [0, 2], "separator": "\n"})
    write_json(root / "mine/run.json", run_facts("train", "done"))
    found = identify(
        load_model(spec),
        IdentifySpec(prompt=["A river"], windows=2, window_tokens=96, controls=3, max_candidates=3),
    )
    write_json(root / "found/run.json", run_facts("identify", "done"))
    write_json(root / "found/result.json", {"identify": as_json(found)})
    write_json(root / "now/run.json", run_facts("train", "running"))
    write_json(root / "now/result.json", {"data": as_json(SUMMARY)})
    runs = {
        f"runs/{arm}/seed-0": {"phase": "runs", "arm": arm, "label": "seed 0", "status": "done"}
        for arm in ("lora", "super")
    }
    arms = {arm: {"policy": arm, "layers": [0, 1, 2]} for arm in ("lora", "super")}
    write_json(root / "study/study.json", {"status": "incomplete", "arms": arms, "runs": runs})
    square = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 4'><path d='M1 1h7v2z'/></svg>"
    (root / "study/pareto.svg").write_text(square)
    with lock_folder(root / "now"):  # as by the process of a training
        yield root


def run_facts(command: str, status: str) -> dict[str, Any]:
    started = "2030-01-01T10:00:00Z"
    return {"status": status, "command": command, "started_at": started, "timings_s": {}}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder of E2E data with two restaurants."""
    folder = tmp_path_factory.mktemp("browser")
    lines = ["mr,ref", *(f'"{mr}","{text}"' for mr, text in ROWS)]
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def server(chromium, model, runs, data, tmp_path_factory) -> Iterator[str]:
    """The address of `swlora serve`, as a process."""
    flags = {"--model": model, "--runs": runs, "--dataset": data, "--max-tokens": 4000}
    with served(tmp_path_factory.mktemp("browser") / "log", flags) as address:
        yield address


@pytest.fixture(scope="module")  # not longer: its event loop would be in the way of other tests
def browser(chromium) -> Iterator[Browser]:
    """A browser for the tests of a file."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # it does not work for root
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS, *sandbox])
        yield found
        found.close()


@pytest.fixture
def visit(browser, server) -> Iterator[Callable[..., Page]]:
    """A function (path, width=1280, height=850, **options of a context) -> the page there.

    Whatever the console or a script complains of fails the test, but for `refusals`: that many
    answers which are no success, and which the browser notes as errors.
    """
    contexts: list[BrowserContext] = []
    complaints: list[str] = []
    expected: list[str] = []

    def open_page(
        path: str, width: int = 1280, height: int = 850, refusals: int = 0, **options: Any
    ) -> Page:
        expected.extend([REFUSAL] * refusals)
        size = {"width": width, "height": height}
        context = browser.new_context(base_url=server, viewport=size, **options)
        contexts.append(context)
        context.add_init_script(WATCH_SHIFTS)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [complaint[: len(REFUSAL)] for complaint in complaints] == expected, complaints


@pytest.fixture
def step_log(runs) -> Iterator[Callable[[int], None]]:
    """A function that lets the training at work go on up to a step."""
    path = runs / "now/metrics.jsonl"

    def go_on(last: int) -> None:
        lines = [
            json.dumps({"step": k, "loss": 1 + 2 / k, "rows": 8 * k, "examples_per_s": 20.0})
            for k in range(1, last + 1)
        ]
        path.write_text("\n".join(lines) + "\n")

    yield go_on
    write_json(runs / "now/run.json", run_facts("train", "running"))
    path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """The folder of pictures, which a CI keeps."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return SCREENSHOTS
