"""Estimates: the ten configurations, their flags, and the table of what was measured."""

from typing import Any

import pytest
from benchmarks.estimates import CONFIGURATIONS, table

from benchmarks import estimates
from swlora.command_settings import SETTINGS
from swlora.config import load_spec
from swlora.settings import flag_name


def test_there_are_ten_that_a_training_takes() -> None:
    assert len({c.name for c in CONFIGURATIONS}) == 10
    paths = {flag_name(path): path for path in SETTINGS["train"]}
    for configuration in CONFIGURATIONS:
        words = configuration.flags.split()
        load_spec(None, {paths[flag]: v for flag, v in zip(words[::2], words[1::2], strict=True)})


def case(memory: float, time: float) -> dict[str, Any]:
    return {
        "foreseen": {
            "memory": {"peak_bytes": 1e9 * (1 + memory)},
            "time": {"train_s": 20 * (1 + time), "probed_steps": 3},
        },
        "used": {"peak_memory_bytes": 1e9, "train_s": 20.0},
        "memory_error": memory,
        "time_error": time,
    }


def test_the_table_counts_what_reaches_the_aims() -> None:
    found = {"a": case(0.1, -0.3), "b": case(-0.2, 0.1), "c": {"error": "killed"}}
    lines = table({"estimates": found}).splitlines()
    assert lines[2] == "| a | 1.10 | 1.00 | +10% | 14.0 | 20.0 | -30% | 3 |"
    assert lines[4].startswith("| c | killed |")
    assert lines[-1] == "memory within 15%: 1 of 3; time within 20%: 1 of 3"


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    calls = []

    def run(module: str, arguments: list[str]) -> dict[str, Any]:
        calls.append((module, arguments[-1]))
        return {"error": "exit code 2: no"}

    monkeypatch.setattr(estimates.Configuration, "arguments", lambda *_: ["train"])
    monkeypatch.setattr(estimates.runner, "run_module", run)
    assert estimates.measured(CONFIGURATIONS[0], tmp_path) == {"error": "exit code 2: no"}
    assert calls == [("swlora", "--dry-run")]
