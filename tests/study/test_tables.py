"""How numbers look, that a table holds what it was given, and every number its own column."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from swlora.files import write_json
from swlora.result_json import as_json
from swlora.study.collect import collect
from swlora.study.report import markdown_report
from swlora.study.results import summarise
from swlora.study.tables import csv_table, markdown_table, number, span
from swlora.web.folders import RunFolders
from swlora.web.pages.study_view import study_tables


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (1.25, 1, False, "1.2"),
        (-1.25, 2, False, "−1.25"),
        (0.5, 1, True, "+0.5"),
        (-0.04, 1, True, "−0.0"),
        (None, 3, True, "n/a"),
    ],
)
def test_numbers(value: float | None, digits: int, sign: bool, text: str) -> None:
    assert number(value, digits, sign=sign) == text


def test_intervals() -> None:
    assert span((-1.0, 2.0), 2, sign=True) == "[−1.00, +2.00]"


def test_a_cell_cannot_break_the_table() -> None:
    table = markdown_table([("a", lambda r: r["x"]), ("b", lambda _: "2")], [{"x": "p | q"}])
    assert table.splitlines() == ["| a | b |", "|---|---:|", "| p \\| q | 2 |"]


def test_csv_holds_every_single_value_under_its_name() -> None:
    full = {
        "name": 'a "b", c',
        "seeds": [0, 2],
        "bleu": 61.25,
        "spread": {"bleu": {"mean": 61.25, "sd": None, "min": 61.0}},
        "curve": {"nll": [1.0]},
        "runs": [{"seed": 0}],
    }
    arms = [full, {"name": "failed", "seeds": [], "status": "failed"}]
    rows = list(csv.DictReader(io.StringIO(csv_table(arms)), strict=True))
    assert rows == [
        {
            "name": 'a "b", c',
            "seeds": "0 2",
            "bleu": "61.25",
            "spread.bleu.sd": "",
            "spread.bleu.min": "61.0",
            "status": "",
        },
        {
            "name": "failed",
            "seeds": "",
            "bleu": "",
            "spread.bleu.sd": "",
            "spread.bleu.min": "",
            "status": "failed",
        },
    ]


def report_of(folder: Path) -> str:
    return markdown_report(summarise(collect(folder)))


def test_times_stand_in_their_columns(two_arms: Any) -> None:
    """The numbers are those of `test_times` of test_results.py."""
    report = report_of(two_arms.save())
    names = "examples/s | speed-up, % | training, s | to the end, s | time saved, %"
    names += " | to the baseline's NLL, s | time saved to it, % | choice of its rate, s"
    assert f"| arm | {names} |" in report
    baseline = "4.0 | +0.0 | 56.0 | 61.0 | +0.0 | 61.0 | +0.0 | 33.0"
    assert f"| **lora** (baseline) | {baseline} |" in report
    assert "| super | 8.0 | +100.0 | 28.0 | 45.0 | +26.2 | 43.0 | +29.5 | 33.0 |" in report


def test_the_page_of_a_study_has_the_same_tables(two_arms: Any) -> None:
    folder = two_arms.save()
    write_json(folder / "results.json", as_json(summarise(collect(folder))))
    (entry,) = RunFolders(folder.parent).studies().values()
    tables = {table.title: table for table in study_tables(entry)}
    assert list(tables) == [
        "Quality, against the baseline",
        "Time",
        "All scores",
        "What was trained",
    ]
    time = tables["Time"]
    assert time.baseline == 0
    assert time.head[:4] == ["arm", "examples/s", "speed-up, %", "training, s"]
    assert time.rows[1][:6] == ["super", "8.0", "+100.0", "28.0", "45.0", "+26.2"]


def test_a_verdict_stands_under_its_own_score(study: Any) -> None:
    study.settings |= {"seeds": [0], "margin": {"bleu": 2.0, "nll": 0.05}}
    for name, quality in (("lora", 0.8), ("mixed", 0.6)):
        study.arm(name, "all", (0,))
        study.run(name, 0, quality=quality, nll=1.2)
    rows = report_of(study.save()).splitlines()
    head, row = (
        [cell.strip() for cell in next(r for r in rows if r.startswith(f"| {name} |")).split("|")]
        for name in ("arm", "mixed")
    )
    verdicts = {name: cell for name, cell in zip(head, row, strict=True) if "verdict" in name}
    assert verdicts == {
        "verdict on BLEU": "inferior (one seed)",
        "verdict on NLL": "non-inferior (one seed)",
    }


def test_an_arm_is_compared_by_the_seeds_that_the_baseline_has_too(study: Any) -> None:
    """The baseline's third seed is unlucky, which says nothing of an arm that lacks it."""
    study.settings |= {"seeds": [0, 1, 2], "margin": {"bleu": 0.5, "nll": 0.01}}
    study.arm("lora", "all", (0, 1, 2))
    for name, seeds in (("less", (0, 1)), ("first", (0,)), ("others", (7, 8))):
        study.arm(name, "all", seeds)
    for seed, nll in enumerate((1.2, 1.21, 1.3)):
        study.run("lora", seed, nll=nll)
    for name, seed, nll in (("less", 0, 1.2), ("less", 1, 1.21), ("first", 0, 1.2)):
        study.run(name, seed, nll=nll)
    for seed in (7, 8):
        study.run("others", seed, nll=1.2)
    results = summarise(collect(study.save()))
    found = {
        arm.name: arm.against_baseline["nll"] for arm in results.finished if arm.name != "lora"
    }
    assert [found[name].seeds for name in ("less", "first", "others")] == [[0, 1], [0], []]
    for name in ("less", "first"):
        assert found[name].difference == 0 and found[name].interval == [0, 0]
    lora, others = (next(a for a in results.finished if a.name == n) for n in ("lora", "others"))
    mean = others.scores.measured("nll") - lora.scores.measured("nll")
    assert found["others"].difference == pytest.approx(mean)
    rows = markdown_report(results).splitlines()
    shown = {name: next(r for r in rows if r.startswith(f"| {name} |")) for name in found}
    assert shown["less"].endswith("| non-inferior |")
    assert shown["first"].endswith("| non-inferior (one seed) |")
    assert shown["others"].endswith(" (other seeds) |")


@pytest.mark.parametrize(("split", "is_told"), [("dev", True), ("test", False)])
def test_a_report_tells_of_rates_that_were_chosen_on_scored_rows(
    two_arms: Any, split: str, is_told: bool
) -> None:
    two_arms.settings["data"] = {"eval_split": split}
    assert ("Those rows are among the ones" in report_of(two_arms.save())) == is_told
