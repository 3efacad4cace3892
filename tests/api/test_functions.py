"""swlora in Python: the same results as of the command line, nothing on disk unless asked for."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.support.data_files import write_rows
from tests.support.small_runs import ROWS, Heard, same_weights, weights
from tests.support.whole_jobs import DEV

import swlora
from swlora.adapters.methods import trainable_parameters
from swlora.api.call import keyword
from swlora.cli import main
from swlora.command_settings import SETTINGS
from swlora.errors import UserError
from swlora.evaluation.user_metrics import MetricError
from swlora.metrics_file import read_metrics
from swlora.result_json import as_json
from swlora.runs import read_run
from swlora.study import compare as study
from swlora.training.callbacks import StepReport

NOT_IN_MEMORY = ("adapter", "adapter_bytes", "loss_figure", "best_adapter", "predictions")
OF_THE_CLOCK = (
    *("train_s", "examples_per_s", "nodes_per_s", "tokens_per_s", "busy_share"),
    *("peak_memory_bytes", "foreseen"),
)


@pytest.fixture
def settings(model_folder, tmp_path, monkeypatch, no_java) -> dict[str, Any]:
    """Keyword arguments of a small training; the working directory is an empty one."""
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return {
        "model": str(model_folder("llama")),
        "dtype": "float32",
        "device": "cpu",
        "dataset": write_rows(tmp_path / "train.jsonl", ROWS),
        "eval_file": write_rows(tmp_path / "dev.jsonl", DEV),
    }


TRAINING = {"rank": 3, "epochs": 2, "batch_size": 3, "learning_rate": 0.02, "layers": "last:2"}


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for n, v in settings.items() for word in (f"--{n.replace('_', '-')}", str(v))]


def run_command(command: str, settings: dict[str, Any], *more: str) -> Any:
    """Run the command line; return its --json."""
    target = Path("..") / f"{command}.json"
    main([command, *flags(settings), "--json", str(target), *more])
    return json.loads(target.read_text())


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


def test_a_model_is_loaded_with_its_adapter_and_generates(settings, model_folder) -> None:
    swlora.train(**settings, **TRAINING, output="../run")
    model = {name: settings[name] for name in ("model", "dtype", "device")}
    loaded, base = swlora.load("../run", **model), swlora.load(**model)
    ids = torch.tensor([[5, 6, 7]])
    plain = peft.PeftModel.from_pretrained(base.model, "../run/adapter").eval()
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    given = {**model, "max_new_tokens": 4}
    text = swlora.generate("name[E]", adapter="../run", **given).text
    written = run_command("generate", given, "--adapter", "../run", "--prompt", "name[E]")
    assert text == written["text"]
    assert os.listdir() == []
    kept = swlora.generate("name[E]", adapter="../run", **given, output="../text")
    assert json.loads(Path("../text/result.json").read_text()) == as_json(kept) == written
    assert read_run(Path("../text"))["command"] == "generate"


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


def test_identification_measures_weights_in_float32_whatever_is_asked_for(settings) -> None:
    asked = {"model": settings["model"], "dtype": "bfloat16", "device": "cpu"}
    small = {"windows": 1, "window_tokens": 32, "controls": 1, "max_candidates": 1}
    assert swlora.identify(**asked, **small, prompt=["hello"]).setup.dtype == "float32"


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


@pytest.mark.parametrize(
    ("prompt", "model", "mistake"),
    [
        (5, "builtin", "a prompt is a text, or a list of texts"),
        (["a", None], "builtin", "a prompt is a text, or a list of texts"),
        ("a", torch.nn.Linear(2, 2), r"trained\.loaded\), not Linear$"),
    ],
)
def test_what_cannot_be_generated_from_is_named(prompt, model, mistake) -> None:
    with pytest.raises(UserError, match=mistake):
        swlora.generate(prompt, model=model)


def test_a_metric_that_is_no_function_is_refused_before_anything_is_loaded() -> None:
    name: Any = "mine.py:score"
    with pytest.raises(UserError, match="metrics is a function of texts and references, not str"):
        swlora.evaluate(model="no-such-model", metrics=name)


def test_merge_returns_the_report_and_takes_the_settings_of_its_command(model_folder, tmp_path):
    from tests.deploy.test_merge import adapter_of

    base = model_folder("llama")
    adapter = adapter_of(base, tmp_path / "a")
    merged = swlora.merge(adapter, tmp_path / "m", model=base, dtype="float16")
    assert merged.dtype == "float16" and (tmp_path / "m" / "config.json").is_file()
    with pytest.raises(UserError, match="takes no dtype 'int8'"):
        swlora.merge(adapter, tmp_path / "n", model=base, dtype="int8")
    for shard_gb in (0.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"shard_gb must be at least 0\.001 and finite"):
            swlora.merge(adapter, tmp_path / "n", model=base, shard_gb=shard_gb)
    with pytest.raises(UserError, match="no setting 'temperature'"):
        swlora.merge(adapter, tmp_path / "n", model=base, temperature=1.0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_callback_ends_a_training_that_goes_on_later(method, settings) -> None:
    """With its adapter, `full` too, whose checkpoints a training that is done does not keep."""
    settings |= TRAINING | {"eval_every_steps": 4, "method": method}
    if method == "full":
        del settings["rank"]
    whole = swlora.train(**settings, output="../whole")
    held_out: dict[int, float] = {}

    def enough(report: StepReport) -> None:
        if report.held_out_loss is not None:
            held_out[report.step] = report.held_out_loss
        if report.step == 5:
            report.stop()

    heard = Heard()
    ended = swlora.train(**settings, output="../ended", callbacks=enough, progress=heard)
    assert (ended.course.steps, ended.course.planned_steps) == (5, 8)
    assert ended.course.held_out.last == held_out.pop(4) and not held_out
    assert "a callback ended the training after step 5 of 8" in heard.lines
    facts = read_run(Path("../ended"))
    assert (facts["status"], facts["stopped_after_step"]) == ("done", 5)
    assert weights(ended.adapter).keys() == weights(whole.adapter).keys()
    with pytest.raises(UserError, match=r"already holds a run \(done\).* or continue it with"):
        swlora.train(**settings, output="../ended")
    main(["train", "--output", "../ended", "--resume"])
    assert same_weights(ended.adapter, whole.adapter)
    facts = read_run(Path("../ended"))
    assert facts["status"] == "done" and "stopped_after_step" not in facts
    assert Path("../ended/checkpoint").exists() is (method == "lora")
    with pytest.raises(SystemExit):
        main(["train", "--output", "../ended", "--resume"])


def test_a_training_that_is_ended_without_a_run_folder(settings) -> None:
    trained = swlora.train(**settings, **TRAINING, callbacks=[lambda report: report.stop()])
    assert trained.course.steps == 1 and os.listdir() == []
    with pytest.raises(UserError, match="callbacks are functions"):
        swlora.train(callbacks="wandb")


def test_a_run_goes_on_as_with_the_flag(settings) -> None:
    """In steps that change it, and not where that is said in two ways, or of no run."""
    settings |= TRAINING
    whole = swlora.train(**settings, output="../whole")

    def interrupt(report: StepReport) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swlora.train(**settings, output="../run", callbacks=interrupt)
    seen: list[int] = []
    trained = swlora.train(
        output="../run", resume=True, callbacks=lambda report: seen.append(report.step)
    )
    assert seen == [4, 5, 6, 7, 8]
    assert same_weights(trained.adapter, whole.adapter)
    longer = swlora.train(output="../run", resume=True, epochs=3)
    assert longer.course.steps == 12
    with pytest.raises(UserError, match="nothing to resume"):
        swlora.train(output="../run", resume=True)
    with pytest.raises(UserError, match="resume=True needs the run's folder: output="):
        swlora.train(resume=True)
    with pytest.raises(UserError, match="verify=True is for a run that can go on"):
        swlora.train(verify=True)
    with pytest.raises(UserError, match="leave out config"):
        swlora.train(output="../run", resume=True, config="c.yaml")
    with pytest.raises(UserError, match="keeps its --rank"):
        swlora.train(output="../run", resume=True, rank=5, epochs=4)


def test_resume_is_forced_where_the_run_is_not_what_it_was(settings) -> None:
    swlora.train(**settings, **TRAINING, output="../run", callbacks=lambda report: report.stop())
    rows = Path(settings["dataset"])
    rows.write_text(rows.read_text().replace("serves", "sells"))
    with pytest.raises(UserError, match="data_sha256"):
        swlora.train(output="../run", resume=True)
    heard = Heard()
    swlora.train(output="../run", force_resume=True, progress=heard)
    assert any(line.startswith("goes on although data_sha256") for line in heard.lines)


def test_prompts_in_a_list_get_their_texts_from_a_model_at_hand(settings) -> None:
    trained = swlora.train(**settings, **TRAINING, output="../run")
    model = {name: settings[name] for name in ("model", "dtype", "device")}
    prompts = ["name[E]", "name[Fritz], food[yy]"]
    each = [swlora.generate(p, adapter="../run", max_new_tokens=4, **model) for p in prompts]
    loaded = swlora.load("../run", **model)
    for at_hand in (loaded, trained.loaded):
        assert swlora.generate(prompts, model=at_hand, max_new_tokens=4) == each
    assert swlora.generate(prompts[0], model=loaded, max_new_tokens=4) == each[0]
    swlora.generate(prompts, model=loaded, max_new_tokens=4, output="../texts")
    assert json.loads(Path("../texts/result.json").read_text()) == {"texts": as_json(each)}
    with pytest.raises(UserError, match="loaded already: leave out adapter, dtype, or give it to"):
        swlora.generate("a", model=loaded, adapter="../run", dtype="float32")
    with pytest.raises(UserError, match="no prompt"):
        swlora.generate([], model=loaded)
    with pytest.raises(UserError, match="--system is a turn of a chat"):
        swlora.generate(["a"], model="nowhere", chat=False, system="be brief")


def test_an_adapter_that_was_loaded_with_its_model_gets_prompts_in_its_form(settings) -> None:
    """With the separator that training put behind a prompt, and as chats where it saw chats."""
    loaded = swlora.load(model=settings["model"], dtype="float32")
    chats = replace(loaded, adapter_facts={"is_chat": True})
    assert swlora.generate("a", model=chats, max_new_tokens=1).chat
    apart = replace(loaded, adapter_facts={"separator": "name"})
    found = swlora.generate("a", model=apart, max_new_tokens=6).text
    assert found == swlora.generate("aname", model=loaded, max_new_tokens=6).text
    assert found != swlora.generate("a", model=loaded, max_new_tokens=6).text


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        ({}, "give either --gguf FILE for a model or --gguf-lora"),
        ({"gguf": "m.gguf", "adapter": "a"}, "merge the adapter into it first"),
        ({"gguf_lora": "m.gguf"}, "--gguf-lora needs the adapter"),
        ({"gguf": "m.gguf", "type": "int8"}, "f32, f16, bf16 or q8_0, not 'int8'"),
        ({"gguf": "m.gguf", "rank": 3}, "export takes no setting 'rank'"),
        ({"gguf": "m.bin", "model": "builtin"}, "end it with .gguf"),
    ],
)
def test_mistakes_in_an_export_are_named(arguments, mistake) -> None:
    with pytest.raises(UserError, match=mistake):
        swlora.export(**arguments)
