"""What a dry run says is what the training then does; it leaves nothing behind."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.models import MakeModel
from tests.support.small_runs import Heard, make_spec, write_data

from swlora import memory, pipeline, time_foreseen
from swlora.cli.estimate import estimate_lines
from swlora.config import RunSpec
from swlora.errors import UserError
from swlora.estimate import Estimate, estimate_training
from swlora.job import Job
from swlora.kernels.tree_layout import TreeLayout
from swlora.result_json import as_json
from swlora.run_record import DryRecord
from swlora.runs import Run, read_metrics, read_result
from swlora.training.step import TreeStep
from swlora.web.pages.estimate_view import estimate_view
from swlora.web.training.errands import Errand

pytestmark = pytest.mark.usefixtures("fresh_cache", "no_drawings")
OPEN_RATE = "of as many layers as are found"


@pytest.fixture(autouse=True)
def own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_bytes", None)
    monkeypatch.setattr(memory, "_asked_bytes", None)


def estimated(spec: RunSpec, folder: Path) -> Estimate:
    return estimate_training(Job(spec, DryRecord(folder), Heard()))


def trained(spec: RunSpec, folder: Path) -> dict[str, Any]:
    with Run.create(folder, spec, "train") as run:
        pipeline.train(Job(spec, run, Heard()))
    return read_result(folder)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_dry_run_tells_what_a_run_does(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    spec = make_spec(model_folder("llama"), write_data(tmp_path), method=method)
    there = set(tmp_path.rglob("*"))
    found = estimated(spec, tmp_path / "run")
    assert set(tmp_path.rglob("*")) == there  # the cache is in this folder, too
    nodes, run_tree = list[int](), TreeStep._nats

    def noted(step: TreeStep, tree: Any, layout: TreeLayout) -> Any:
        nodes.append(layout.n_nodes)
        return run_tree(step, tree, layout)

    monkeypatch.setattr(TreeStep, "_nats", noted)
    result = trained(spec, tmp_path / "run")
    metrics, train = read_metrics(tmp_path / "run"), result["train"]
    assert found.refused is None
    assert (found.n_steps, found.n_trainable) == (len(metrics), train["n_trainable"])
    assert (found.n_epochs, found.method) == (train["epochs"], train["method"])
    assert train["examples_per_s"] == pytest.approx(train["rows"] / train["train_s"])
    assert found.layers == train["layers"]
    assert sum(found.maps.values()) == 7 * len(found.layers)
    assert found.n_rows == result["data"]["train"]["n_rows"] == 12
    assert found.n_tokens == 2 * result["data"]["train"]["n_tokens"]
    assert found.n_nodes == 2 * result["data"]["steps"]["n_nodes"]
    first_epoch = sum(nodes[: len(nodes) // 2])
    assert first_epoch == result["data"]["steps"]["n_nodes"]
    assert found.memory is not None and found.time is not None
    assert 0 < found.time.train_s < 60
    assert train["adapter_bytes"] < found.disk["adapter"] + 20_000
    assert found.kept_states_bytes == found.missing_states_bytes > 0
    # A second time, the states are there; nothing else is another.
    again = estimated(spec, tmp_path / "other")
    assert again.missing_states_bytes < again.kept_states_bytes == found.kept_states_bytes
    assert again.n_nodes == found.n_nodes


def test_a_run_says_what_was_foreseen_and_used(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_foreseen, "AFTER_S", 0.0)
    spec, heard = make_spec(model_folder("llama"), write_data(tmp_path)), Heard()
    with Run.create(tmp_path / "run", spec, "train") as run:
        pipeline.train(Job(spec, run, heard))
    (memory_line,) = [line for line in heard.lines if line.startswith("peak memory: about")]
    assert " (process " in memory_line
    (time_line,) = [line for line in heard.lines if line.startswith("time: about")]
    assert time_line.endswith("by the first 3 steps")
    train = read_result(tmp_path / "run")["train"]
    foreseen = train["foreseen"]
    assert foreseen["used_peak_memory_bytes"] == train["peak_memory_bytes"]
    # Both are of this whole process, which has run other tests.
    assert 0.5 < foreseen["peak_memory_bytes"] / foreseen["used_peak_memory_bytes"] < 1.5
    assert foreseen["used_train_s"] >= train["train_s"]
    assert 0.2 < foreseen["train_s"] / foreseen["used_train_s"] < 5


def test_why_no_states_are_kept_is_said_once(
    make_model: MakeModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.5, 6.0, 20.0]}
    make_model("llama", rope_parameters=rope).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    spec = make_spec(tmp_path / "model", write_data(tmp_path))
    for work, record in (
        (estimate_training, DryRecord(tmp_path / "run")),
        (pipeline.train, Run.prepare(tmp_path / "run", spec, "train")),
    ):
        work(Job(spec, record, heard := Heard()))
        assert len([line for line in heard.lines if line.startswith("no prefix cache")]) == 1


def test_layers_that_are_found_later_are_assumed(model_folder: Any, tmp_path: Path) -> None:
    spec = make_spec(model_folder("llama"), write_data(tmp_path), adapter__layers="auto:0.5")
    found = estimated(spec, tmp_path / "run")
    assert (found.layers, found.layers_found_by) == ([0, 1, 2], "auto:0.5")
    assert found.kept_states_bytes == 0


@pytest.mark.parametrize(
    ("layers", "given", "rate", "said", "shown"),
    [
        *(
            (policy, None, None, "at the learning rate of as many layers as are found", OPEN_RATE)
            for policy in ("super", "auto:0.5")
        ),
        ("super", 0.02, 0.02, "at a learning rate of 0.02", "0.02"),
        ("2", None, 1.7e-3, "at a learning rate of 0.0017", "0.0017"),
    ],
)
def test_the_rate_is_that_of_the_layers_where_they_are_known(
    model_folder: Any,
    tmp_path: Path,
    layers: str,
    given: float | None,
    rate: float | None,
    said: str,
    shown: str,
) -> None:
    changes: dict[str, Any] = {"adapter__layers": layers, "train__learning_rate": given}
    spec = make_spec(model_folder("llama"), write_data(tmp_path), **changes)
    found = estimate_training(Job(spec, DryRecord(tmp_path / "run"), heard := Heard()))
    assert found.learning_rate == rate
    lines = [line for line in heard.lines if line.startswith("learning rate")]
    assert all(f"{rate:g}, for lora in 1 of 3 layers" in line for line in lines)
    assert len(lines) == (layers == "2")
    assert ("", said) in estimate_lines(found)
    done = SimpleNamespace(is_over=True, result=as_json(found))
    assert ("Learning rate", shown) in estimate_view(cast("Errand", done)).facts


def test_padded_batches_have_a_time(model_folder: Any, tmp_path: Path) -> None:
    spec = make_spec(model_folder("llama"), write_data(tmp_path), train__engine="plain")
    found = estimated(spec, tmp_path / "run")
    assert (found.memory, found.n_nodes) == (None, None)
    assert found.time is not None and found.time.train_s > 0


def test_without_room_on_the_disk_it_says_what_would_fit(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(model_folder("llama"), write_data(tmp_path))
    needed = estimated(spec, tmp_path / "run").disk
    real = shutil.disk_usage(tmp_path)
    # Room for two checkpoints, and not for a third.
    free = sum(needed.values()) - needed["checkpoints"] // 3 + 10
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=free))
    found = estimated(spec, tmp_path / "run")
    assert found.refused is not None and "--keep-checkpoints 1 would fit" in found.refused
    assert found.time is None
    with pytest.raises(UserError, match="--keep-checkpoints 1 would fit"):
        trained(spec, tmp_path / "run")
    fewer = make_spec(model_folder("llama"), write_data(tmp_path), train__keep_checkpoints=1)
    assert estimated(fewer, tmp_path / "run").refused is None


def test_without_memory_both_refuse(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(model_folder("llama"), write_data(tmp_path), adapter__layers="all")
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000)
    found = estimated(spec, tmp_path / "run")
    assert found.refused is not None and "there are 10 KB" in found.refused
    with pytest.raises(UserError, match="the fewest that can run at once"):
        trained(spec, tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()
