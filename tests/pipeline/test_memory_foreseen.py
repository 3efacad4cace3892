"""A run that would exceed --memory-gb is run in smaller parts from its start, and goes on so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.small_runs import (
    Heard,
    make_spec,
    same_weights,
    signal_in_step,
    weights,
    write_data,
)

from swlora import memory, pipeline
from swlora.job import Job
from swlora.runs import Run, read_metrics, read_run


@pytest.fixture(autouse=True)
def own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_bytes", None)
    monkeypatch.setattr(memory, "_asked_bytes", None)


def trained(folder: Path, spec: Any) -> list[str]:
    heard = Heard()
    with Run.create(folder, spec, "train") as run:
        pipeline.train(Job(spec, run, heard))
    return [line for line in heard.lines if line.startswith("memory")]


def test_the_adapter_is_the_same_with_little_memory(model_folder: Any, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    settings = {"adapter__layers": "all", "train__batch_size": 12, "model__memory_gb": 1.0}
    assert not trained(tmp_path / "much", make_spec(model_folder("llama"), data, **settings))
    assert read_run(tmp_path / "much")["tokens_at_once"] is None
    little = make_spec(model_folder("llama"), data, **settings | {"model__memory_gb": 0.0025})
    (said, *_) = trained(tmp_path / "little", little)
    assert "tokens at once would take" in said and "with the same gradient" in said
    assert 64 <= read_run(tmp_path / "little")["tokens_at_once"] < 200
    much, few = (weights(tmp_path / name / "adapter") for name in ("much", "little"))
    for name, weight in much.items():
        torch.testing.assert_close(few[name], weight, rtol=1e-3, atol=1e-5)
    losses = [[row["loss"] for row in read_metrics(tmp_path / n)] for n in ("much", "little")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # The limit was that of one training, not of the process.
    plenty = make_spec(model_folder("llama"), data, adapter__layers="all", train__batch_size=12)
    assert not trained(tmp_path / "plenty", plenty)
    assert read_run(tmp_path / "plenty")["tokens_at_once"] is None


def test_a_run_goes_on_with_the_parts_that_it_began_with(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is free then, so that the last bits are those of a run that was not stopped."""
    spec = make_spec(model_folder("llama"), write_data(tmp_path), train__batch_size=12)
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"epochs": 6})})
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_800_000)
    trained(tmp_path / "whole", spec)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "append_metrics", signal_in_step(2))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "stopped", spec)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 40)
    monkeypatch.setattr(memory, "_free_bytes", None)  # as in another process
    run, again = Run.reopen(tmp_path / "stopped", "train")
    with run:
        pipeline.train(Job(again, run, Heard()))
    facts = [read_run(tmp_path / name) for name in ("whole", "stopped")]
    assert [fact["tokens_at_once"] for fact in facts] == [64, 64]
    # Some, but not all that are worth it: on some processors each copy gives other last bits.
    limits = [fact["copies_limit_bytes"] for fact in facts]
    assert limits[0] == limits[1] < 60_000
    assert same_weights(tmp_path / "whole/adapter", tmp_path / "stopped/adapter")
