"""swlora in Python: the same results as of the command line, nothing on disk unless asked for."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from tests.support.api_calls import TRAINING, run_command
from tests.support.small_runs import Heard, weights

import swlora
from swlora.adapters.methods import trainable_parameters
from swlora.command_settings import SETTINGS, keyword
from swlora.deploy import merge as merging
from swlora.errors import UserError
from swlora.evaluation.user_metrics import MetricError
from swlora.metrics_file import read_metrics
from swlora.result_json import as_json
from swlora.runs import read_run
from swlora.study import compare as study
from swlora.study.compared import Compared

NOT_IN_MEMORY = ("adapter", "adapter_bytes", "loss_figure", "best_adapter", "predictions")
OF_THE_CLOCK = (
    *("train_s", "examples_per_s", "nodes_per_s", "tokens_per_s", "busy_share"),
    *("peak_memory_bytes", "foreseen"),
)


def comparable(result: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in result.items() if n not in (*NOT_IN_MEMORY, *OF_THE_CLOCK)}


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_training_without_a_run_folder_is_that_of_the_command_line(method, settings) -> None:
    settings |= TRAINING | {"method": method, "seed": 5}
    trained = swlora.train(**settings)
    assert os.listdir() == []
    result = as_json(trained)
    assert result["adapter"] is result["adapter_bytes"] is result["loss_figure"] is None
    expected = run_command("train", settings, "--output", "../run")
    assert comparable(result) == comparable(expected)
    saved = weights(Path("../run/adapter"))
    found = peft.get_peft_model_state_dict(trained.model)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert not trained.model.training


def test_output_makes_the_run_folder_of_the_command(settings) -> None:
    trained = swlora.train(**settings, **TRAINING, output="../run")
    facts = read_run(Path("../run"))
    assert (facts["status"], facts["command"]) == ("done", "train")
    assert len(read_metrics(Path("../run"))) == trained.course.steps == 8
    assert trained.adapter == Path("../run/adapter")
    left = json.loads(Path("../run/result.json").read_text())
    assert left.keys() == {"data", "train"} and left["train"] == as_json(trained)
    with pytest.raises(UserError, match="already holds a run"):
        swlora.train(**settings, **TRAINING, output="../run")


def test_evaluation_with_and_without_a_run_folder(settings) -> None:
    swlora.train(**settings, **TRAINING, output="../run")
    evaluation = settings | {"max_new_tokens": 5, "eval_prompts": 2}
    evaluated = swlora.evaluate("../run", **evaluation)
    assert os.listdir() == []
    assert evaluated.predictions is None
    expected = run_command("eval", evaluation, "--adapter", "../run", "--output", "../eval")
    assert comparable(as_json(evaluated)) == comparable(expected)
    assert evaluated.nll < swlora.evaluate(**evaluation).nll
    assert evaluated.loss.nats_per_token == evaluated.nll


@pytest.mark.parametrize("returned", [None, float("nan"), "raise"])
def test_a_metric_that_fails_loses_nothing_that_was_measured(returned, settings) -> None:
    seen = []

    def mine(predictions: list[str], references: list[list[str]]) -> Any:
        seen.append((predictions, references))
        if returned == "raise":
            raise KeyError("no such word")
        return returned

    evaluation = settings | {"max_new_tokens": 5, "eval_prompts": 2}
    with pytest.raises(MetricError, match="the error's `evaluated` has the texts") as failed:
        swlora.evaluate(**evaluation, metrics=mine)
    assert os.listdir() == [] and "\n" not in str(failed.value)
    left, expected = failed.value.evaluated, swlora.evaluate(**evaluation)
    assert as_json(left) == as_json(expected)
    assert ([*left.texts.predictions], [*left.texts.references]) == seen[0]
    assert [*left.texts.predictions] == [*expected.texts.predictions]
    assert len(left.texts.prompts) == 2


def test_identification_leaves_nothing_either(settings) -> None:
    small = {name: settings[name] for name in ("model", "dtype", "device")}
    small |= {"windows": 1, "window_tokens": 32, "controls": 1, "max_candidates": 1}
    small["prompt"] = "hello"
    found = swlora.identify(**small | {"prompt": ["hello"]})
    assert os.listdir() == []
    expected = run_command("identify", small, "--output", "../found")
    assert set(expected) - set(as_json(found)) == {"figure", "figures", "report"}
    assert as_json(found) == {name: expected[name] for name in as_json(found)}
    assert found.report is found.figure is None
    figure = Path("../spikes.svg")
    drawn = swlora.identify(**small | {"prompt": ["hello"]}, figure=str(figure))
    assert (drawn.figure, drawn.figures, drawn.report) == (figure, None, None)
    assert figure.read_bytes().startswith(b"<?xml") and os.listdir() == []


def test_identification_measures_weights_in_float32_whatever_a_file_says(settings) -> None:
    """A file serves several commands; an argument that would do nothing is refused."""
    asked = {"model": settings["model"], "device": "cpu", "prompt": ["hello"]}
    small = {"windows": 1, "window_tokens": 32, "controls": 1, "max_candidates": 1}
    Path("c.yaml").write_text("model: {dtype: bfloat16}\n")
    assert swlora.identify(**asked, **small, config="c.yaml").setup.dtype == "float32"
    with pytest.raises(UserError, match="identify measures weights in float32; leave out --dtype"):
        swlora.identify(**asked, **small, dtype="bfloat16")


def test_progress_is_told_what_is_not_kept(settings) -> None:
    heard = Heard()
    stopping = TRAINING | {"early_stopping": 3}
    trained = swlora.train(**settings, **stopping, progress=heard)
    assert trained.course.held_out is not None and trained.best_adapter is None
    assert any("lowest held-out loss is not kept" in line for line in heard.lines)


def test_a_file_with_settings_and_arguments_that_win(settings, tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("adapter: {rank: 7}\ntrain: {epochs: 1, batch_size: 6}\n")
    trained = swlora.train(config=config, **settings, rank=2, layers="2")
    assert (trained.course.steps, trained.layers) == (2, [2])
    assert {p.shape[0] for n, p in trainable_parameters(trained.model).items() if "_A" in n} == {2}


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        ({"windows": 2}, "--layers all looks for no super weight .*; leave out --windows"),
        ({"keep_checkpoints": 1, "save_every": "9s"}, "there are no checkpoints; .* --save-every$"),
        ({"checkpoint_every_s": 9.0}, r"without a run folder \(output\) there are no checkpoints"),
        ({"sample_prompts": "a", "progress": False}, "nobody sees samples without a run folder"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(arguments, mistake) -> None:
    with pytest.raises(UserError, match=mistake):
        swlora.train(model="no-such-model", **arguments)


def test_settings_that_need_somebody_who_looks_are_taken_where_there_is_one(tmp_path) -> None:
    """So that what is wrong is the next thing: there is no such model."""
    looked_at = {"sample_prompts": "a", "progress": Heard()}
    for arguments in (looked_at, {"keep_checkpoints": 1, "output": tmp_path / "run"}):
        with pytest.raises(UserError, match=r"there is no model folder \./no-such-model"):
            swlora.train(model="./no-such-model", dataset="sample", **arguments)


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        ({"rnak": 3}, r"train takes no setting 'rnak' \(do you mean rank\?\)"),
        ({"num_beams": 3}, "train takes no setting 'num_beams'"),
        ({"rank": 0}, "--rank: must be"),
        ({"layers": "lats:2"}, "do you mean last:2"),
    ],
)
def test_mistakes_are_named(arguments, mistake) -> None:
    with pytest.raises(UserError, match=mistake):
        swlora.train(**arguments)


def test_every_setting_of_a_command_has_a_keyword_of_its_own() -> None:
    for command, paths in SETTINGS.items():
        assert len({keyword(path) for path in paths}) == len(paths), command
    assert [keyword(p) for p in ("model.name", "data.eval_split", "train.batch_size")] == [
        *("model", "split", "batch_size")
    ]


def test_a_study_without_a_folder_is_temporary(monkeypatch, tmp_path) -> None:
    seen: list[study.Request] = []

    def compare(request: study.Request) -> dict[str, Any]:
        request.output.mkdir()
        seen.append(request)
        return {"status": "done"}

    monkeypatch.setattr(study, "compare", compare)
    monkeypatch.chdir(tmp_path)
    assert swlora.compare("study.yaml", only=["lora"], controls=False) == {"status": "done"}
    assert not seen[0].output.exists() and os.listdir() == []
    swlora.compare("study.yaml", output="kept")
    assert (seen[0].only, seen[0].overrides) == (["lora"], {"controls": False})
    assert (seen[1].output, seen[1].overrides) == (Path("kept"), {"controls": None})
    assert os.listdir() == ["kept"]


def test_paths_may_begin_at_the_home_folder(monkeypatch, tmp_path) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(study, "compare", asked.append)
    monkeypatch.setattr(merging, "merge", lambda request, _progress: asked.append(request))
    swlora.compare("~/study.yaml", output="~/study")
    swlora.merge("~/adapter", "~/merged", model="builtin")
    assert (asked[0].path, asked[0].output) == (tmp_path / "study.yaml", tmp_path / "study")
    assert (asked[1].adapter, asked[1].output) == (tmp_path / "adapter", tmp_path / "merged")


def test_what_a_study_without_a_folder_came_to_outlives_a_failed_run(monkeypatch) -> None:
    """Its error names no file of the folder that is gone."""

    def compare(request: study.Request) -> Any:
        raise study.NotDoneError("runs/dora/seed-0: failed", f"see {request.output}", found)

    found = cast(Compared, object())
    monkeypatch.setattr(study, "compare", compare)
    with pytest.raises(study.NotDoneError, match="runs/dora/seed-0: failed; the error's") as failed:
        swlora.compare("study.yaml")
    assert failed.value.compared is found and tempfile.gettempdir() not in str(failed.value)
    with pytest.raises(study.NotDoneError, match=r"; see kept$"):
        swlora.compare("study.yaml", output="kept")


def test_random_numbers_of_the_caller_go_on(settings) -> None:
    before = torch.get_rng_state()
    swlora.train(**settings, **TRAINING)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_program_imports_at_first_is_light() -> None:
    code = (
        "import sys, swlora\n"
        "import swlora.api\n"
        "for name in (*swlora.api.__all__, 'StepReport'): getattr(swlora, name)\n"
        "assert 'train' in dir(swlora) and callable(swlora.train)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy', 'rich', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(swlora.__all__) <= set(dir(swlora))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        swlora.trian  # noqa: B018


def test_a_metric_that_is_no_function_is_refused_before_anything_is_loaded() -> None:
    name: Any = "mine.py:score"
    with pytest.raises(UserError, match="metrics is a function of texts and references, not str"):
        swlora.evaluate(model="no-such-model", metrics=name)
