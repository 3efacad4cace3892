"""`swlora env`, `check` and `schema`."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tests.support.data_files import write_rows
from tests.support.schemas import validated

from swlora import machine, matrix_peak
from swlora.config_schema import run_schema, study_schema

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*ROOT.glob("examples/*.yaml"), *ROOT.glob("studies/*.yaml")])


pytestmark = pytest.mark.usefixtures("no_network")


# Schema


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_files_here_fit_the_schema(path):
    tree = yaml.safe_load(path.read_text())
    assert validated(tree, study_schema() if "arms" in tree else run_schema()) == []


def test_the_schema_says_what_is_wrong():
    wrong = ({"method": "lorra"}, {"rank": 0}, {"rang": 4}, {"layers": {"last": 4}})
    for tree in ({"train": {"epochs": "many"}}, *({"adapter": adapter} for adapter in wrong)):
        assert validated(tree, run_schema()), tree
    forms = {"layers": [2, "11"], "targets": "q_proj,v_proj"}, {"layers": 2}, None
    for adapter in forms:
        assert validated({"adapter": adapter, "model": None}, run_schema()) == []


def test_the_schema_describes(swlora):
    done = swlora("schema")
    assert done.code == 0
    schema = json.loads(done.out)
    assert schema == run_schema()
    train = schema["$defs"]["TrainSpec"]["properties"]
    assert "one of" not in train["row_tokens"] and train["row_tokens"]["description"]
    assert train["schedule"]["enum"] == ["linear", "cosine", "constant"]
    arms = json.loads(swlora("schema", "--study").out)["properties"]["arms"]
    assert arms == study_schema()["properties"]["arms"]


# Check


def test_a_good_file(swlora, model, rows):
    Path("good.yaml").write_text(
        yaml.safe_dump({"model": {"name": model}, "data": {"name": str(rows), "eval_share": 0.5}})
    )
    done = swlora("check", "good.yaml", "--json", "found.json")
    assert done.code == 0 and done.err == ""
    found = json.loads(Path("found.json").read_text())
    assert found["problems"] == [] and found["kind"] == "run"
    resolved = dict(found["resolved"])
    assert resolved["model"].endswith(model)
    assert resolved["adapter"].startswith("lora in layers 0-2 of 3, ")
    assert resolved["rows"].startswith("4 to train on, 4 dev")
    assert resolved["steps"].startswith("about 12 of 1 row (3 epochs)")
    assert resolved["learning rate"] == "0.001, linear"
    assert "good.yaml: nothing is wrong with this run" in done.out


def test_every_fault_has_a_line(swlora):
    Path("bad.yaml").write_text("adapter: {rank: 0, layrs: all}\ntrain: {epochs: x}\n")
    done = swlora("check", "bad.yaml")
    assert done.code == 2
    assert done.err.splitlines() == [
        "bad.yaml: adapter.rank: must be greater than or equal to 1, not 0",
        "bad.yaml: adapter.layrs: there is no such setting (do you mean adapter.layers?)",
        "bad.yaml: train.epochs: must be a valid integer, not 'x'",
    ]


def test_what_is_not_there(swlora, model):
    tree = {
        "model": {"name": model},
        "data": {"name": "no-rows.jsonl"},
        "identify": {"text": "no-text.txt"},
        "train": {"sample_prompts": "no-prompts.txt"},
        "adapter": {"layers": "2,11"},
    }
    Path("bad.yaml").write_text(yaml.safe_dump(tree))
    done = swlora("check", "bad.yaml")
    assert done.code == 2
    lines = done.err.splitlines()
    places = [line.removeprefix("bad.yaml: ").split(":")[0] for line in lines]
    assert sorted(places) == ["adapter", "data", "identify.text", "train"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"adapter": {"start": "runs/first"}}, "and --adapter starts from another"),
        ({"adapter": {"method": "pissa"}}, "and not --method pissa"),
        ({"train": {"learning_rate": 0.01}}, "and --learning-rate is set already"),
    ],
)
def test_a_rate_that_cannot_be_found(swlora, model, rows, section, said):
    tree = {"model": {"name": model}, "data": {"name": str(rows), "eval_share": 0.5}} | section
    tree["train"] = {"find_learning_rate": True, **section.get("train", {})}
    Path("bad.yaml").write_text(yaml.safe_dump(tree))
    done = swlora("check", "bad.yaml")
    assert done.code == 2
    assert any("--find-learning-rate" in line and said in line for line in done.err.splitlines())
    assert "found by a trial" not in done.out


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"eval_share": 0.5}}, "data: rows.jsonl, line 9 has 300 tokens, "),
        ({"data": {"train_on": "last-turn"}}, "data: --train-on last-turn: no row is a chat"),
        ({"data": {"name": "text.txt"}, "train": {"early_stopping": 2}}, "data: the data set has"),
        ({"data": {"name": "text.txt"}, "train": {"sample_prompts": ["x"]}}, "data: --sample-pr"),
        ({"decode": {"max_new_tokens": 250}}, "evaluation: a prompt of 8 tokens and 250 new ones"),
    ],
    ids=["long rows", "no chats", "no early stopping", "no samples", "no room"],
)
def test_what_a_training_refuses_without_weights(swlora, model, sections, said):
    rows = [{"prompt": f"prompt {k}", "completion": "answer"} for k in range(8)]
    if "line 9" in said:
        rows.append({"prompt": "p", "completion": "x" * 298})
    write_rows(Path("rows.jsonl"), rows)
    Path("text.txt").write_text("One sentence. " * 20)
    tree = {"model": {"name": model}, **sections}
    tree["data"] = {"name": "rows.jsonl", **sections.get("data", {})}
    Path("bad.yaml").write_text(yaml.safe_dump(tree))
    done = swlora("check", "bad.yaml")
    assert done.code == 2 and done.err.count("\n") == 1
    assert done.err.startswith(f"bad.yaml: {said}")
    verb = "train-eval" if said.startswith("evaluation") else "train"
    refused = swlora(verb, "--config", "bad.yaml", "--device", "cpu")
    assert refused.code == 2 and done.err.split(": ", 2)[2] in refused.err  # in the same words


def test_no_model(swlora, rows):
    Path("bad.yaml").write_text(f"model: {{name: ./nowhere}}\ndata: {{name: '{rows}'}}\n")
    done = swlora("check", "bad.yaml")
    assert (done.code, done.err) == (2, "bad.yaml: model: there is no model folder ./nowhere\n")
    assert "rows" in done.out  # the rest is looked at all the same


def test_no_configuration(swlora):
    Path("list.yaml").write_text("[1]")
    assert swlora("check", "list.yaml").mistake.startswith("list.yaml must hold a mapping")
    assert swlora("check", "nothing.yaml").mistake.startswith("cannot read the configuration")


def test_a_study(swlora, model, rows):
    sections = {
        "model": {"name": model, "dtype": "float32"},
        "data": {"name": str(rows), "eval_share": 0.5},
        "decode": {"max_new_tokens": 8},
    }
    arms = {"arms": ["lora", "last:1", "super"]}
    Path("study.yaml").write_text(yaml.safe_dump({**sections, **arms, "random_draws": 1}))
    done = swlora("check", "study.yaml")
    assert done.code == 0, done
    assert "last-1: lora, layers 2" in done.out
    assert "learning rates 0.00085, 0.0017, 0.0034, 0.0068, 0.014" in done.out  # one of three
    assert "super: lora, layers super, learning rates that follow from the layers" in done.out
    Path("study.yaml").write_text(yaml.safe_dump({**sections, "arms": ["lorra"], "sed": 1}))
    done = swlora("check", "study.yaml")
    assert done.code == 2
    assert {line.split(":")[1].strip() for line in done.err.splitlines()} == {"sed", "arm lorra"}


# Env


def test_env(swlora, monkeypatch):
    monkeypatch.setattr(matrix_peak, "N_CPU", 32)
    done = swlora("env", "--json", "env.json")
    assert done.code == 0, done
    found = json.loads(Path("env.json").read_text())
    assert found["packages"]["torch"] == torch.__version__
    assert found["dtype"] in ("float32", "bfloat16") and found["device"] in ("cpu", "cuda")
    assert found["peaks_flops"]["float32"] > 0 and found["n_cores"] >= 1
    assert matrix_peak.known_peak(torch.float32, found["device"]) > 0  # later runs compare
    for name in ("processor", "matrix peak, TFLOP/s", "llama.cpp", "cache", "a training here"):
        assert name in done.out


def test_env_where_nothing_can_be_kept(swlora, monkeypatch, fresh_cache):
    monkeypatch.setattr(matrix_peak, "N_CPU", 32)
    (fresh_cache / matrix_peak.PEAKS).mkdir(parents=True)  # which no file replaces
    done = swlora("env")
    assert done.code == 0, done
    assert "matrix peak, TFLOP/s" in done.out


def test_a_folder_is_no_package(monkeypatch, tmp_path):
    """Such as W&B's own, wandb, in the folder from which `python -m swlora env` is called."""
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine, "MORE_PACKAGES", ("no_such_package", "numpy"))
    assert list(machine._more_packages()) == ["numpy"]
