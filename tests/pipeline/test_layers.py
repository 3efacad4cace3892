"""`--layers auto:BUDGET` through the pipeline: what is recorded, said, and kept on resuming."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.small_runs import Heard, make_spec, write_data

from swlora import pipeline
from swlora.errors import UserError
from swlora.evaluation import english
from swlora.job import Job
from swlora.loss_sum import LossSum
from swlora.progress import Silent
from swlora.runs import Run
from swlora.training import layer_choice, loop
from swlora.training.layer_choice import Choice, Trial

pytestmark = pytest.mark.usefixtures("no_drawings")


def test_few_steps_take_all_layers_and_say_so(model_folder, tmp_path) -> None:
    spec = make_spec(model_folder("llama"), write_data(tmp_path), adapter__layers="auto:0.5")
    heard = Heard()
    with Run.create(tmp_path / "run", spec, "train") as run:
        result = pipeline.train(Job(spec, run, heard))
        recorded = run.read_result()["layer_choice"]
    assert result.layers == recorded["layers"] == [0, 1, 2]
    assert [line for line in heard.lines if line.startswith("all layers: of the 8 steps")] == [
        recorded["reason"]
    ]
    assert recorded["trials"] == []


def test_a_resumed_run_keeps_the_layers_that_were_measured(
    model_folder, tmp_path, monkeypatch
) -> None:
    """A stopwatch may choose others the second time, whose weights the checkpoint would not fit."""
    trials = [
        Trial("all", [0, 1, 2], 1.0, 8, 1.2, 1.2),
        Trial("last:1", [2], 0.4, 17, 1.1, 1.15),
        Trial("middle", [1], 0.7, 12, 1.3, 1.3),
    ]

    def choose(*_: Any) -> Choice:
        return layer_choice.decide(trials, 0.5, {"trials": trials, "loss_before_nats": 4.0})

    step, n_left = loop._one_step, 3

    def stopping(*arguments: Any) -> Any:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(layer_choice, "choose", choose)
    changes = {"adapter__layers": "auto:0.5", "train__checkpoint_every_s": 1e-9}
    spec = make_spec(model_folder("llama"), write_data(tmp_path), **changes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_one_step", stopping)
        with Run.create(tmp_path / "run", spec, "train") as run:
            pipeline.train(Job(spec, run, Silent()))

    monkeypatch.setattr(layer_choice, "choose", lambda *_: pytest.fail("it measured again"))
    run, spec = Run.reopen(tmp_path / "run", "train")
    heard = Heard()
    with run:
        result = pipeline.train(Job(spec, run, heard))
    assert "resuming after step 3" in heard.lines
    assert (result.layers, result.course.steps) == ([2], 8)


def test_auto_is_refused_before_the_run_where_nothing_can_be_measured(
    model_folder, tmp_path
) -> None:
    data = write_data(tmp_path)
    spec = make_spec(model_folder("falcon"), data, adapter__layers="auto:0.5")
    run = Run.prepare(tmp_path / "run", spec, "train")
    with pytest.raises(UserError, match="--layers auto needs prefix trees"), run:
        pipeline.train(Job(spec, run, Silent()))
    assert not (tmp_path / "run").exists()


def test_english_text_is_measured_in_one_dtype_before_and_after(
    model_folder, tmp_path, monkeypatch
) -> None:
    """The search for super weights needs float32; what is trained after it is in bfloat16."""
    found = SimpleNamespace(layers=[1], removal_layers=[])
    dtypes: list[Any] = []

    def measure(model: Any, *_: Any) -> LossSum:
        dtypes.append(model.dtype)
        return LossSum(2.0, 1)

    monkeypatch.setattr(pipeline, "identify", lambda _job: found)
    monkeypatch.setattr(english, "untouched_english_loss", measure)
    monkeypatch.setattr(english, "english_loss", measure)
    changes = {"adapter__layers": "super", "model__dtype": "bfloat16", "data__english": True}
    changes |= {"decode__max_new_tokens": 2, "train__epochs": 1, "identify__window_tokens": 64}
    spec = make_spec(model_folder("llama"), write_data(tmp_path), **changes)
    with Run.create(tmp_path / "run", spec, "train-eval") as run:
        pipeline.train_evaluate(Job(spec, run, Silent()))
    assert dtypes == [torch.bfloat16, torch.bfloat16]
