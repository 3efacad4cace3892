"""The report of the scenarios: ratios by hand, the table, and why an arm did not run."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.scenario_data import SCENARIOS, Scenario
from benchmarks.scenario_report import markdown, ratios

from benchmarks import cases, runner, scenarios


def arm(rate: float, peak_bytes: float, **first: Any) -> dict[str, Any]:
    return {"epochs": [{"examples_per_s": rate, **first}], "peak_bytes": peak_bytes}


SUMMARY = {
    "ours": arm(12.0, 2e9, tokens=600, tokens_run=200, gemm_share=0.5),
    "ours-flat": arm(5.0, 4e9),
    "peft": arm(2.0, 8e9),
    "unsloth": arm(3.0, 5e9) | {"loss_check": {"unsloth": 1.50004, "peft": 1.5}},
    "trl": {"error": "trl is not installed"},
}


def test_ratios_are_to_the_best_of_the_peers_that_ran() -> None:
    found = ratios(SUMMARY)
    assert found["best_peer"] == "unsloth"
    assert found["vs_best_peer"] == 4.0
    assert found["vs_peers"] == {"peft": 6.0, "unsloth": 4.0}
    assert found["memory_vs_best_peer"] == 0.4
    assert found["ideal"] == 3.0
    assert found["realised"] == 2.4
    assert found["realised_vs_ideal"] == pytest.approx(0.8)


def test_what_did_not_run_leaves_its_ratios_open() -> None:
    failed = {"error": "killed"}
    without_ours = ratios({**SUMMARY, "ours": failed})
    assert without_ours["vs_best_peer"] is without_ours["realised"] is None
    assert without_ours["best_peer"] == "unsloth"
    alone = ratios({"ours": SUMMARY["ours"], "peft": failed})
    assert alone["best_peer"] is alone["vs_best_peer"] is None
    assert alone["ideal"] == 3.0


def test_the_table_has_a_line_a_scenario_and_says_what_did_not_run() -> None:
    facts = {"title": "E2E", "tokens_a_row": 59.6}
    failed = {name: {"error": "no E2E folder"} for name in ("ours", "peft")}
    report = {
        "scenarios": {
            "e2e": {**facts, "arms": SUMMARY, "ratios": ratios(SUMMARY)},
            "none": {"title": "nothing", "tokens_a_row": None, "arms": failed,
                     "ratios": ratios(failed)},
        }
    }  # fmt: skip
    lines = markdown(report).splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[2] == (
        "| E2E | 60 | 3.00 | 2.40 | 0.80 | 12.00 | unsloth | 3.00 | 4.00 | 2.00 | 5.00 | 0.40 "
        "| 0.50 |"
    )
    assert lines[3] == "| nothing" + " | -" * 12 + " |"
    assert lines[5:8:2] == [
        "Loss of one batch, Unsloth's and plain PEFT's with its adapter:",
        "- e2e, unsloth: 1.5000 and 1.5000",
    ]
    assert lines[9] == "Not run:"
    assert "- e2e, trl: trl is not installed" in lines
    assert "- none, ours: no E2E folder" in lines


def test_an_arm_that_cannot_run_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--unsloth-python" in str(cases.missing("unsloth", None))
    assert "no program /no/python" in str(cases.missing("unsloth-compiled", "/no/python"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "trl is not installed" in str(cases.missing("trl", None))
    assert cases.missing("ours", None) is None


def test_a_quick_run_leaves_slow_arms_to_e2e_unless_they_are_named() -> None:
    arms = ["ours", "trl", "unsloth-compiled"]
    quick, named, full = (
        argparse.Namespace(quick=is_quick, arms=names)
        for is_quick, names in ((True, None), (True, "ours,trl"), (False, None))
    )
    assert scenarios.arms_of(SCENARIOS["e2e"], arms, quick) == arms
    assert scenarios.arms_of(SCENARIOS["labels"], arms, quick) == ["ours"]
    assert scenarios.arms_of(SCENARIOS["labels"], arms, named) == arms
    assert scenarios.arms_of(SCENARIOS["labels"], arms, full) == arms


def test_the_others_go_on_where_an_arm_or_a_scenario_cannot_run(
    monkeypatch: pytest.MonkeyPatch, builtin_dir: Path, tmp_path: Path
) -> None:
    ran: list[str] = []

    def run_module(module: str, arguments: list[str], *_others: Any) -> dict[str, Any]:
        ran.append(arguments[0])
        return {"error": "exit code 1: a reason"}

    monkeypatch.setattr(runner, "run_module", run_module)
    monkeypatch.setattr(runner, "builtin_model", lambda: str(builtin_dir))
    args = argparse.Namespace(
        quick=True, rounds=1, arms="x", e2e=tmp_path / "none", unsloth_python=None
    )
    chosen = [SCENARIOS["e2e"], SCENARIOS["labels"]]
    report = scenarios.measured(chosen, ["ours", "unsloth"], args)
    assert ran == ["ours"]
    arms = {name: one["arms"] for name, one in report["scenarios"].items()}
    assert "is no E2E folder" in arms["e2e"]["ours"]["error"]
    assert arms["labels"]["ours"]["error"] == "exit code 1: a reason"
    assert "--unsloth-python" in arms["labels"]["unsloth"]["error"]
    json.dumps(report)
    assert markdown(report).count("- labels, ") == 2


def test_unknown_names_are_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["scenarios", "--json", "x", "--scenarios", "e2e,no"])
    with pytest.raises(SystemExit, match="no scenario is called 'no'; there are e2e, system-"):
        scenarios.main()


def test_rows_a_step_can_be_given_in_place_of_the_scenarios(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: dict[str, tuple[int, int]] = {}

    def measured(chosen: list[Scenario], arms: list[str], args: argparse.Namespace) -> Any:
        ran.update({arm: chosen[0].amount(arm, args.quick) for arm in arms})

    monkeypatch.setattr(scenarios, "measured", measured)
    monkeypatch.setattr(cases, "publish", lambda *_: None)
    options = ["--scenarios", "e2e", "--arms", "ours,peft"]
    monkeypatch.setattr("sys.argv", ["x", "--json", "x", *options, "--peer-batch", "8"])
    scenarios.main()
    assert ran == {"ours": (64, 1024), "peft": (8, 128)}
    monkeypatch.setattr("sys.argv", ["x", "--json", "x", *options, "--ours-batch", "0"])
    with pytest.raises(SystemExit):
        scenarios.main()
