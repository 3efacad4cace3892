"""The benchmark of the drop-ins: its arms on a tiny model, and its table."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.token_rows import TokenRows
from tests.support.models import ModelFolder

from benchmarks import integrations, integrations_arm


def rows() -> TokenRows:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(5, 200, 9).tolist() for _ in range(4)]
    return TokenRows.from_parts(
        [(prompt, False), (rng.integers(5, 200, 4 + k).tolist(), True)]
        for prompt in prompts
        for k in range(3)
    )


@pytest.mark.parametrize(("loop", "drop_in"), [("own", "tree+sampler"), ("trainer", "tree")])
def test_arms_count_what_they_ran(
    model_folder: ModelFolder, tmp_path: Path, loop: str, drop_in: str
) -> None:
    rows().save(tmp_path / "rows.npz")
    args = argparse.Namespace(loop=loop, drop_in=drop_in, model=str(model_folder("llama")),
                              tokens=tmp_path / "rows.npz", batch=3, steps=2)  # fmt: skip
    found = integrations_arm.measured(args)
    (epoch,) = found["epochs"]
    assert (epoch["steps"], epoch["rows"]) == (2, 6)
    assert 6 * 13 <= epoch["tokens_run"] <= 6 * 15
    assert epoch["tokens_per_s"] > 0 and 1 < found["train_loss"] < 20


def test_the_table_has_gains_and_says_what_did_not_run() -> None:
    def measured(tokens_per_s: float) -> dict[str, Any]:
        return {"tokens_per_s": tokens_per_s, "peak_bytes": 2.5e9}

    arms = {
        "e2e own none": measured(100),
        "e2e own tree": measured(250),
        "e2e trl none": {"error": "trl is not installed"},
        "e2e trl tree": measured(5),
    }
    lines = integrations.markdown({"arms": arms}).splitlines()
    assert lines[2:] == [
        "| e2e | a loop of one's own | as it is | 100 | 1.00 | 2.50 |",
        "| e2e | a loop of one's own | `tree_loss` | 250 | 2.50 | 2.50 |",
        "| e2e | `SFTTrainer` | `tree_loss` | 5 | - | 2.50 |",
        "",
        "e2e trl none: trl is not installed",
    ]
