"""What a run's page says of the data that were trained on."""

from typing import Any

import pytest
from tests.support.page_reading import NASTY, look
from tests.support.summaries import SPLIT, SUMMARY

from swlora.config import RunSpec
from swlora.result_json import as_json
from swlora.runs import Run


@pytest.fixture
def shown(make, browse, tmp_path, monkeypatch):
    """A function result -> the page of a run with it."""
    monkeypatch.setattr("swlora.web.folders.FRESH_S", 0.0)

    def show(result: dict[str, Any]):
        run = Run.create(tmp_path / "runs/mine", RunSpec(), "train")
        run.record(status="done")
        run.write_result(result)
        with browse(make(runs=tmp_path / "runs")) as client:
            return look(client, "/runs/mine")

    return show


def test_the_page_says_what_was_trained_on(shown):
    text = shown({"data": as_json(SUMMARY)}).text
    for said in (
        "What it was trained on",
        "42,061",
        "42,063",
        "4,862; 42,000 rows share theirs",
        "2,000,000, 45.0% trained",
        "54 median, 75 p95, 90 longest",
        "Over the context of 8,192",
        "2: its prompt is empty",
        "2.12, ",
    ):
        assert said in text
    assert "Tree nodes a step" in text


def test_without_trees_nothing_is_said_of_them(shown):
    block = {name: value for name, value in as_json(SUMMARY).items() if name != "steps"}
    text = shown({"data": block}).text
    assert "42,061" in text and "nodes" not in text


def test_what_the_data_say_is_text_and_names_no_folder(shown):
    block = as_json(SUMMARY) | {"bad_rows": {NASTY: 1, "it is in /home/me/rows.jsonl": 2}}
    page = shown({"data": block})
    assert NASTY in page.text and "x" not in [image.get("src") for image in page.all("img")]
    assert "rows.jsonl" in page.text and "/home" not in page.text


@pytest.mark.parametrize(
    "block",
    [None, 3, [], "x", {}, {"train": 3}, as_json(SUMMARY) | {"bad_rows": [1]}]
    + [as_json(SUMMARY) | {"train": as_json(SPLIT) | {"n_rows": value}} for value in ("x", None)],
)
def test_a_block_of_another_version_gives_less(shown, block):
    page = shown({"data": block})
    assert "What it was trained on" not in page.text and "What was run" in page.text


def test_a_run_from_before_there_was_a_block_has_no_section(shown):
    assert "What it was trained on" not in shown({"train": {"steps": 3}}).text
