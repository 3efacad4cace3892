"""`--dry-run` on the command line."""

import json

import pytest


@pytest.mark.parametrize("command", ["train", "train-eval"])
def test_a_dry_run_shows_a_block_and_writes_nothing(swlora, small, tmp_path, command) -> None:
    there = set(tmp_path.iterdir())
    done = swlora(command, *small, "--dry-run", "--json", tmp_path / "estimate.json")
    assert done.code == 0, done
    assert set(tmp_path.iterdir()) - there == {tmp_path / "estimate.json"}
    lines = done.out.splitlines()
    assert len(lines) <= 14
    names = [line.split("  ")[0] for line in lines if not line.startswith(" ")]
    assert names == ["model", "adapter", "data", "steps", "memory", "time", "disk"]
    found = json.loads((tmp_path / "estimate.json").read_text())
    assert found["n_steps"] == 2
    assert found["memory"]["peak_bytes"] >= sum(
        found["memory"][f"{part}_bytes"]
        for part in ("process", "weights", "copies", "adapter", "step")
    )
    assert f"{found['n_trainable']:,} weights are trained" in done.out


def test_what_has_begun_has_no_dry_run(swlora, small) -> None:
    mistake = swlora("train", *small, "--dry-run", "--resume", "--output", "run").mistake
    assert "leave out --resume" in mistake


def test_a_folder_that_cannot_be_is_refused_as_by_the_run(swlora, small, rows) -> None:
    told = {
        swlora("train", *small, *more, "--output", rows).mistake for more in ([], ["--dry-run"])
    }
    assert len(told) == 1
