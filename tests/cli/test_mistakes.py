"""Every mistake is one line and exit code 2, and leaves no run folder."""

import json
import re
from pathlib import Path

import pytest

from swlora import job
from swlora.adapters import on_base
from swlora.config import DEFAULT_DATASET, DEFAULT_MODEL, load_spec
from swlora.models import load
from swlora.runs import read_run

RUN_VERBS = ["identify", "train", "eval", "train-eval"]


# Usage


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--foo"], "No such option: --foo"),
        (["train", "--lerning-rate", "1"], "--find-learning-rate, --learning-rate"),
        (["train", "--rank", "abc"], "Invalid value for '--rank'"),
        (["train", "--rank"], "'--rank' requires an argument"),
        (["train", "extra"], "extra"),
        (["generate"], "Missing option '--prompt'"),
        (["score", "--predictions", "p.txt"], "Missing option '--references'"),
        (["eval", "--resume", "--output", "x"], "No such option: --resume"),
        (["identify", "--json", "."], "'--json'"),
        (["score", "--seed", "1"], "No such option: --seed"),
        (["identify", "--figure", "."], "'--figure'"),
    ],
)
def test_usage_errors_are_one_line_that_points_to_help(arguments, said, swlora):
    mistake = swlora(*arguments).mistake
    assert said in mistake
    assert re.search(r"; see swlora( [a-z-]+)? --help$", mistake)


@pytest.mark.parametrize("verb", RUN_VERBS)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "some/model"], "some/model is not a folder, is not cached"),
        (["--model", "./nowhere"], "there is no model folder ./nowhere"),
        (["--model", "no such model"], "'no such model' is neither a folder nor a Hub id"),
        (["--device", "cuda:77"], "--device cuda:77: this machine has"),
        (["--dtype", "float16"], "--dtype: must be 'auto', 'float32' or 'bfloat16', not 'float16'"),
        (["--seed", "-1"], "--seed: must be greater than or equal to 0, not -1"),
        (["--config", "gone.yaml"], "cannot read the configuration gone.yaml"),
        (["--output", "rows.jsonl"], "rows.jsonl is a file and no folder; choose another --output"),
    ],
)
def test_mistakes_that_every_run_shares(verb, arguments, said, swlora, rows):
    dataset = [] if verb == "identify" else ["--dataset", rows]
    assert said in swlora(verb, *dataset, *arguments).mistake
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "nowhere"], "no data set 'nowhere'"),
        (["--dataset", "gone.jsonl"], "cannot read gone.jsonl"),
        (["--layers", "7"], "layer 7 does not exist; this model has layers 0 to 2"),
        (["--layers", "lats:2"], "--layers: 'lats:2' is not understood (do you mean last:2?)"),
        (["--targets", "nope"], "no projection is called 'nope'"),
        (["--rank", "0", "--alpha", "0"], "--rank: must be greater than or equal to 1, not 0; --a"),
        (["--learning-rate", "nan"], "--learning-rate: must be a finite number, not nan"),
        (
            ["--prompt-column", "question"],
            "rows.jsonl, line 1: it has no column 'question'; columns found: 'prompt'",
        ),
        (["--tokenizer", "some/tokenizer"], "the tokenizer some/tokenizer is not a folder"),
        (["--revision", "main"], "--revision is a version on the Hub"),
        (["--layers", "super", "--window-tokens", "300"], "exceeds the model's context of 256"),
        (
            ["--layers", "super", "--window-tokens", "32", "--targets", "nope"],
            "no projection is called 'nope'",
        ),
        (["--method", "adalora"], "it needs at least"),
        (["--method", "adalora", "--rank", "24"], "starts at rank 36"),
        (["--eval-every-steps", "1", "--split", "test"], "has no test split; use --split dev"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "train-eval"])
def test_mistakes_in_training(verb, arguments, said, swlora, small):
    assert said in swlora(verb, *small, *arguments).mistake
    assert not Path("runs").exists()


def test_mistakes_in_evaluation(swlora, small, model_folder, rows):
    swlora("train", *small, "--output", "run")
    base = ["eval", "--model", model_folder("gpt2"), "--dataset", rows]
    Path("empty").mkdir()
    for arguments, said in (
        (["--adapter", "gone"], "there is no adapter folder gone"),
        (["--adapter", "empty"], "empty is no adapter folder"),
        (["--adapter", "run"], "the adapter in run/adapter does not fit this model"),
        (["--split", "test"], "has no test split; use --split dev"),
        (["--max-new-tokens", 256], "exceed the model's context of 256"),
    ):
        assert said in swlora(*base, *arguments).mistake
    assert not Path("runs").exists()


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_an_adapter_that_is_none_costs_no_loading(verb, swlora, model_folder, monkeypatch):
    for module in (job, on_base):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    Path("empty").mkdir()
    extra = ["--prompt", "x"] if verb == "generate" else []
    mistake = swlora(verb, "--model", model_folder("llama"), "--adapter", "empty", *extra).mistake
    assert mistake == "empty is no adapter folder: it holds no adapter_config.json"


@pytest.mark.parametrize("verb", ["train", "eval", "train-eval"])
def test_a_model_that_is_none_costs_no_reading(verb, swlora, monkeypatch):
    monkeypatch.setattr(job, "load_dataset", lambda _: pytest.fail("it was read"))
    Path("empty").mkdir()
    for name, said in (("./gone", "there is no model folder"), ("empty", "cannot be loaded")):
        assert said in swlora(verb, "--model", name).mistake


def test_a_run_without_names_goes_on_with_what_took_their_place(
    swlora, model_folder, monkeypatch, tmp_path
):
    """And what was named is not replaced, though it is the same as the default."""
    monkeypatch.setattr(load, "hub_reachable", lambda: False)
    monkeypatch.setattr(load, "cached_file", lambda *_: None)
    monkeypatch.setattr(load, "_builtin", lambda: str(model_folder("llama")))
    small = [
        "--dtype",
        "float32",
        "--max-steps",
        2,
        "--train-rows",
        9,
        "--truncate",
        "--output",
        "run",
    ]
    for named, said in (
        (["--model", DEFAULT_MODEL], "is not cached, and the Hugging Face Hub cannot be reached"),
        (["--dataset", DEFAULT_DATASET], "or give --dataset sample"),
    ):
        assert said in swlora("train", *small, *named).mistake
    assert not Path("run").exists()
    done = swlora("train", *small)
    assert done.code == 0
    assert f"the embedded model, because {DEFAULT_MODEL} is not cached" in done.err
    assert "data: the built-in sample (made from a grammar; not E2E), since" in done.err
    spec = load_spec(Path("run/config.yaml"), {})
    assert (spec.model.name, spec.data.name) == ("builtin", "sample")
    assert "there is nothing to resume" in swlora("train", "--resume", "--output", "run").mistake
    facts = read_run(Path("run")) | {"status": "cancelled"}
    Path("run/run.json").write_text(json.dumps(facts))
    assert swlora("train", "--resume", "--output", "run").code == 0


def test_the_same_output_will_do_after_a_mistake(swlora, small):
    swlora("train", *small, "--output", "run", "--layers", "7").mistake  # noqa: B018
    assert swlora("train", *small, "--output", "run").code == 0


def test_a_result_that_cannot_be_written_is_known_first(swlora, small):
    mistake = swlora("train", *small, "--json", "rows.jsonl/result.json").mistake
    assert mistake.endswith("rows.jsonl is a file and no folder; choose another --json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapter: {rank: 4", "is not valid YAML"),
        ("- 1", "must hold a mapping"),
        (
            "adapter: {rnak: 4}\nfoo: 1",
            "adapter.rnak: there is no such setting (do you mean adapter.rank?); foo: there is no",
        ),
        ("adapter: {rank: four}", "adapter.rank: "),
    ],
)
def test_mistakes_in_the_configuration(text, said, swlora, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert said in swlora("train", "--config", "c.yaml").mistake
    assert said in swlora("generate", "--config", "c.yaml", "--prompt", "x").mistake
