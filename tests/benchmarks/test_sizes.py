"""Sizes: the cases that are made, the report by hand, and what is refused before it starts."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.scenario_report import ratios as scenario_ratios
from benchmarks.sizes import ROWS, cases_of, layer_numbers, markdown, ratios
from benchmarks.token_rows import TokenRows

from benchmarks import cases, random_model, runner, sizes

TINY = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
}


def arm(rate: float, peak_bytes: float, **first: Any) -> dict[str, Any]:
    first = {"examples_per_s": rate, "tokens": 1024, "steady_s": 2 / rate, "rows": 2, **first}
    return {"epochs": [first], "peak_bytes": peak_bytes, "gemm_flops": 4e11}


ARMS = {
    "ours": arm(0.2, 4e9, necessary_flops=3e12, tokens_run=1020, gemm_share=0.75),
    "peft": arm(0.1, 8e9),
    "unsloth": arm(0.16, 5e9),
    "trl": {"error": "trl is not installed"},
}


def test_shares_of_the_peak_are_of_what_the_rows_need() -> None:
    found = ratios(ARMS)
    assert found["share_of_peak"] == pytest.approx({"ours": 0.75, "peft": 0.375, "unsloth": 0.6})
    assert found["best_peer"] == "unsloth"
    assert found["vs_best_peer"] == pytest.approx(1.25)
    assert ratios({"peft": ARMS["peft"]})["share_of_peak"] == {}


def test_the_table_has_a_line_an_arm() -> None:
    case = {"shape": "1.1B", "layers": "all", "tokens_a_row": 512.0, "arms": ARMS}
    lines = markdown({"sizes": {"1.1B-all-512": {**case, "ratios": ratios(ARMS)}}}).splitlines()
    assert lines[2] == "| 1.1B | all | 512 | ours | 0.20 | 102 | 4.00 | 0.75 | - | - |"
    assert lines[4] == "| 1.1B | all | 512 | unsloth | 0.16 | 82 | 5.00 | 0.60 | 1.25 | 0.80 |"
    assert lines[5] == "| 1.1B | all | 512 | trl" + " | -" * 6 + " |"
    assert lines[-1] == "- 1.1B-all-512, trl: trl is not installed"
    assert len({line.count("|") for line in lines[:6]}) == 1


def test_what_is_added_takes_the_place_of_the_same_case() -> None:
    def report(rate: float, *names: str) -> dict[str, Any]:
        rounds = [{f"{name} ours": {"rate": rate} for name in names}]
        about = {"benchmark": "sizes", "wall_s": rate}
        return about | {"sizes": dict.fromkeys(names, rate), "rounds": rounds}

    found = cases.added(report(1.0, "a", "b"), report(2.0, "b", "c"))
    assert found["sizes"] == {"a": 1.0, "b": 2.0, "c": 2.0}
    assert found["rounds"] == [
        {"a ours": {"rate": 1.0}},
        {"b ours": {"rate": 2.0}, "c ours": {"rate": 2.0}},
    ]
    assert found["wall_s"] == 3.0


def test_the_last_layers_are_those_of_the_shape() -> None:
    assert layer_numbers("all", 22) is None
    assert layer_numbers("last:4", 22) == (18, 19, 20, 21)


def test_a_model_and_its_rows_are_made_and_what_is_too_large_is_not_started(
    monkeypatch: pytest.MonkeyPatch, builtin_dir: Path, tmp_path: Path
) -> None:
    ran: list[list[str]] = []

    def run_module(_module: str, arguments: list[str], *_others: Any) -> dict[str, Any]:
        ran.append(arguments)
        return {"error": "exit code 1: a reason"}

    monkeypatch.setattr(runner, "run_module", run_module)
    monkeypatch.setattr(runner, "builtin_model", lambda: str(builtin_dir))
    monkeypatch.setitem(random_model.SHAPES, "tiny", TINY)
    args = argparse.Namespace(quick=True, rounds=1, e2e=tmp_path / "none", unsloth_python=None)
    made = cases_of("tiny", ["last:4"], list(ROWS), ["ours", "peft"], tmp_path, args)
    assert [case.name for case in made] == ["tiny-last:4-60", "tiny-last:4-512"]
    assert "is no E2E folder" in made[0].facts["rows"]
    for case, n_tokens in zip(made, (60, 512), strict=True):
        assert set(TokenRows.load(tmp_path / f"{n_tokens}.npz").lengths) == {n_tokens}
        assert case.facts["tokens_a_row"] == n_tokens
    report = cases.run("sizes", made, args, ratios, sizes.QUICK_LIMIT_S)
    assert [a[0] for a in ran] == ["ours", "peft"] * 2
    assert all(a[a.index("--layers") + 1] == "2,3,4,5" for a in ran)
    assert "a reason" in markdown(report)

    monkeypatch.setattr("swlora.memory.available_bytes", lambda: 1_200_000_000)
    report = cases.run("sizes", made, args, ratios, sizes.QUICK_LIMIT_S)
    arms = report["sizes"]["tiny-last:4-512"]["arms"]
    assert [a[0] for a in ran[4:]] == ["ours", "ours"]
    assert "not started: 2 rows a step would need about 1.5 GB" in arms["peft"]["error"]
    assert arms["ours"]["error"] == "exit code 1: a reason"
    assert scenario_ratios(arms)["best_peer"] is None
    json.dumps(report)
