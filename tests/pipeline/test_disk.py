"""A training's room on the disk is foreseen: what it needs is about what it writes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support.small_runs import Heard, make_spec, write_data

from swlora import pipeline, runs
from swlora.caches import disk_bytes
from swlora.disk_space import Need
from swlora.errors import UserError
from swlora.job import Job
from swlora.runs import Run, read_run
from swlora.training import disk_needs

METHODS = ["lora", "dora", "adalora", "pissa", "full", "supertuning"]


def needs_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return where the needs of the next training are put, by their names."""
    found: dict[str, int] = {}
    right = disk_needs.training_needs

    def noted(*args: Any, **settings: Any) -> list[Need]:
        needs = right(*args, **settings)
        found.update({need.what: need.n_bytes for need in needs})
        return needs

    monkeypatch.setattr(disk_needs, "training_needs", noted)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_what_is_foreseen_is_about_what_is_written(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    needs, written = needs_of(monkeypatch), dict[str, int]()
    save = runs.Run.sync

    def measured(run: Run) -> None:
        files = (run.folder / "checkpoint").glob("state-*.safetensors")
        sizes = [written.get("checkpoint", 0), *(f.stat().st_size for f in files)]
        written["checkpoint"] = max(sizes)  # AdaLoRA lets go of its scores in the end
        save(run)

    monkeypatch.setattr(runs.Run, "sync", measured)
    settings = {"train__checkpoint_every_s": 1e-9, "train__eval_every_steps": 4}
    spec = make_spec(model_folder("llama"), write_data(tmp_path), method=method, **settings)
    with Run.create(tmp_path / "run", spec, "train") as run:
        pipeline.train(Job(spec, run, Heard()))
    weights = (tmp_path / "run/adapter/adapter_model.safetensors").stat().st_size
    assert weights < needs["adapter"] + 20_000  # names and a header beside the numbers
    assert needs["best/"] == 2 * needs["adapter"]
    one = needs["checkpoints"] / 3  # two are kept, beside a new one
    assert one < written["checkpoint"] < 1.2 * one + 40_000  # a header and the generator's state
    metrics = (tmp_path / "run/metrics.jsonl").stat().st_size
    assert metrics / 2 < needs["metrics"] < 3 * metrics


def test_a_run_without_room_ends_before_its_first_step_and_can_go_on(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(model_folder("llama"), write_data(tmp_path))
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=10_000))
    run = Run.create(tmp_path / "run", spec, "train")
    with pytest.raises(UserError, match=r"needs room for .* checkpoints.* has 10 KB free"), run:
        pipeline.train(Job(spec, run, Heard()))
    assert read_run(tmp_path / "run")["status"] == "failed"
    assert not (tmp_path / "run/metrics.jsonl").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real)
    again, spec = Run.reopen(tmp_path / "run", "train")
    with again:
        pipeline.train(Job(spec, again, Heard()))
    assert [row["step"] for row in runs.read_metrics(tmp_path / "run")] == list(range(1, 9))


def test_the_prefix_cache_leaves_the_run_its_room(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for the run alone there is no cache; then neither lacks anything."""
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    needs, heard = needs_of(monkeypatch), Heard()
    spec = make_spec(model_folder("llama"), write_data(tmp_path))
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: real._replace(free=sum(needs.values()) + 100)
    )
    with Run.create(tmp_path / "run", spec, "train") as run:
        pipeline.train(Job(spec, run, heard))
    (said,) = [line for line in heard.lines if line.startswith("no prefix cache")]
    assert said.endswith("whose disk has 100 bytes to spare")
    assert not disk_bytes(tmp_path / "cache/prefix")


def test_a_checkpoint_that_is_there_needs_no_more_room(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = needs_of(monkeypatch)
    spec = make_spec(model_folder("llama"), write_data(tmp_path))
    with Run.create(tmp_path / "run", spec, "train") as run:
        (tmp_path / "run/checkpoint").mkdir()
        (tmp_path / "run/checkpoint/state-1.safetensors").write_bytes(bytes(8192))
        pipeline.train(Job(spec, run, Heard()))
    with_one = needs["checkpoints"]
    with Run.create(tmp_path / "other", spec, "train") as run:
        pipeline.train(Job(spec, run, Heard()))
    assert needs["checkpoints"] - with_one == 8192
