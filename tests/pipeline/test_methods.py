"""Every method through the pipeline: what it reports, saves and resumes; loss while training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.support.models import ModelFolder
from tests.support.small_runs import DEV, make_spec, same_weights, signal_in_step

from swlora import pipeline
from swlora.adapters.methods import METHODS
from swlora.adapters.saved import load_adapter, read_facts
from swlora.config import RunSpec
from swlora.errors import UserError
from swlora.evaluation.dealt import dealt_losses
from swlora.evaluation.loss import dataset_loss
from swlora.job import Job
from swlora.metrics_file import read_metrics
from swlora.models.load import load_model
from swlora.progress import Silent
from swlora.result_json import as_json
from swlora.runs import Run
from swlora.training.frozen_prefix import PrefixCache

pytestmark = pytest.mark.usefixtures("no_drawings")


def train_in(folder: Path, spec: RunSpec) -> tuple[Any, dict[str, Any], Job]:
    with Run.create(folder, spec, "train") as run:
        job = Job(spec, run, Silent())
        trained = pipeline.train(job)
        return trained.model, as_json(trained), job


@pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_reported_is_what_was_saved(
    model_folder: ModelFolder, data: dict[str, str], tmp_path: Path, method: str, dtype: str
) -> None:
    spec = make_spec(model_folder("llama"), data, method=method, model__dtype=dtype)
    model, result, job = train_in(tmp_path / "run", spec)
    folder = tmp_path / "run" / "adapter"
    assert (result["method"], result["layers"], result["steps"]) == (method, [1, 2], 8)
    assert read_facts(folder)["method"] == method
    assert result["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert 1e8 < result["peak_memory_bytes"] < 1e11
    lines = read_metrics(tmp_path / "run")
    assert result["last_loss"] == lines[-1]["loss"] < lines[0]["loss"]

    saved = load_file(folder / "adapter_model.safetensors")
    n_saved = sum(t.numel() for t in saved.values() if t.is_floating_point())
    if method == "adalora":
        assert set(result["rank_pattern"]) == {
            name.removeprefix("base_model.model.").removesuffix(".lora_E")
            for name in saved
            if name.endswith(".lora_E")
        }
        assert sum(result["rank_pattern"].values()) == 3 * 2 * 7
        assert n_saved < result["n_trainable"]
    else:
        assert "rank_pattern" not in result
        assert n_saved == result["n_trainable"] * (2 if method == "pissa" else 1)

    base = load_model(spec.model).model
    loaded = load_adapter(base, folder)
    rows = job.encoded("dev").sequences
    assert dataset_loss(loaded, rows, Silent()).sum_nats == pytest.approx(
        dataset_loss(model.eval(), rows, Silent()).sum_nats, rel=1e-6
    )


@pytest.mark.parametrize("method", ["adalora", "full", "lora+", "pissa", "dora"])
def test_an_interrupted_run_ends_in_the_same_adapter(
    model_folder: ModelFolder,
    data: dict[str, str],
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec(model_folder("llama"), data, method=method, train__checkpoint_every_s=1e-9)
    _, expected, _ = train_in(tmp_path / "whole", spec)

    def out_of_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("swlora.adapters.saved.save_adapter", out_of_disk)
        train_in(tmp_path / "late", spec)  # after the last step, before anything is saved
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "append_metrics", signal_in_step(3))
        train_in(tmp_path / "early", spec)
    for folder in (tmp_path / "late", tmp_path / "early"):
        run, resumed_spec = Run.reopen(folder, "train")
        with run:
            result = as_json(pipeline.train(Job(resumed_spec, run, Silent())))
        assert result["last_loss"] == expected["last_loss"]
        assert result.get("rank_pattern") == expected.get("rank_pattern")
        assert same_weights(folder / "adapter", tmp_path / "whole" / "adapter")


# Loss on held-out rows while training


def test_held_out_loss_is_measured_off_the_clock_and_changes_nothing(
    model_folder: ModelFolder, data: dict[str, str], tmp_path: Path
) -> None:
    """With dropout, which is random: the training must not notice the measurements."""
    changes: dict[str, Any] = {"adapter__dropout": 0.3}
    without = make_spec(model_folder("llama"), data, train__eval_every_steps=0, **changes)
    observed = make_spec(model_folder("llama"), data, train__eval_every_steps=3, **changes)
    train_in(tmp_path / "without", without)
    model, _, job = train_in(tmp_path / "observed", observed)
    plain, lines = read_metrics(tmp_path / "without"), read_metrics(tmp_path / "observed")
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    assert not any("eval_nll" in line for line in plain)
    measured = {line["step"]: line for line in lines if "eval_nll" in line}
    assert list(measured) == [3, 6, 8]  # every third step, and the last
    loss = dataset_loss(model.eval(), job.encoded("dev").sequences, Silent())
    last = measured[8]
    assert (last["eval_sum_nats"], last["eval_n_tokens"]) == (loss.sum_nats, loss.n_tokens)
    assert last["eval_nll"] == loss.nats_per_token < measured[3]["eval_nll"]
    assert all(line["eval_s"] > 0 for line in measured.values())


def test_its_time_does_not_count(
    model_folder: ModelFolder,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = [0.0]

    def slow_loss(*arguments: Any) -> Any:
        now_s[0] += 1000.0
        return dealt_losses(*arguments)

    monkeypatch.setattr("swlora.evaluation.held_out.dealt_losses", slow_loss)
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    spec = make_spec(model_folder("llama"), data, train__eval_every_steps=3)
    monkeypatch.setattr(Run, "append_metrics", lambda _run, values: seen.append(values))
    seen: list[dict[str, Any]] = []
    step = pipeline.train

    def tick(values: Any) -> Any:
        now_s[0] += 1.0
        return values

    monkeypatch.setattr("swlora.training.step.build_tree", _ticking(tick))
    monkeypatch.setattr(Run, "metrics", lambda _run: seen)
    with Run.create(tmp_path / "run", spec, "train") as run:
        trained = step(Job(spec, run, Silent()))
    assert trained.course.train_s == seen[-1]["elapsed_s"] < 100
    assert [line.get("eval_s", 0) for line in seen] == [0, 0, 1000, 0, 0, 1000, 0, 1000]


def _ticking(tick: Callable[[Any], Any]) -> Callable[..., Any]:
    from swlora.data.prefix_tree import build_tree

    return lambda *arguments: tick(build_tree(*arguments))


@pytest.mark.parametrize(("eval_rows", "n_rows"), [(1, 1), (2, 2), (None, 2), (9, 2)])
def test_the_first_rows_are_measured(
    model_folder: ModelFolder,
    data: dict[str, str],
    tmp_path: Path,
    eval_rows: int | None,
    n_rows: int,
) -> None:
    changes: dict[str, Any] = {"train__eval_rows": eval_rows, "train__eval_every_steps": 8}
    train_in(tmp_path / "run", make_spec(model_folder("llama"), data, **changes))
    last = read_metrics(tmp_path / "run")[-1]
    assert last["eval_n_tokens"] == sum(len(row["completion"]) + 1 for row in DEV[:n_rows])


def test_rows_that_are_never_measured_are_refused(model_folder: ModelFolder) -> None:
    with pytest.raises(UserError, match="--eval-rows needs held-out losses"):
        make_spec(model_folder("llama"), {}, train__eval_rows=3, train__eval_every_steps=0)


# The prefix cache


def test_the_prefix_cache_is_closed_when_training_ends_and_when_it_fails(
    model_folder: ModelFolder,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_cache: Path,
) -> None:
    opened: list[PrefixCache] = []
    original = PrefixCache.__init__

    def recorded(self: PrefixCache, *arguments: Any, **settings: Any) -> None:
        original(self, *arguments, **settings)
        opened.append(self)

    monkeypatch.setattr(PrefixCache, "__init__", recorded)
    spec = make_spec(model_folder("llama"), data)
    train_in(tmp_path / "done", spec)
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(Run, "append_metrics", signal_in_step(2))
        train_in(tmp_path / "stopped", spec)
    assert len(opened) == 2
    assert all(cache._data is None for cache in opened)
    assert opened[0].n_computed_groups > 0 and opened[1].n_read_trees > 0
