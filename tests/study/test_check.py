"""What cannot work is known before anything trains; what is not at hand is said, never replaced."""

import json
from dataclasses import replace

import pytest
from tests.support.data_files import write_rows

from swlora.adapters.methods import adapt
from swlora.config import DEFAULT_DATASET, DEFAULT_MODEL
from swlora.models.load import load_model, load_skeleton
from swlora.study.arms import arms_of
from swlora.study.check import check
from swlora.study.spec import StudySpec

ROWS = [{"prompt": f"prompt {k}\n", "completion": f"answer {k}."} for k in range(45)]


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def study(model_folder, rows):
    """A function (arms, **sections) -> StudySpec for the tiny Llama of three layers."""

    def make(*arms, family="llama", **sections):
        section = {"name": str(model_folder(family)), "dtype": "float32"}
        base = {"model": section, "data": {"name": str(rows)}, "decode": {"max_new_tokens": 8}}
        return StudySpec.model_validate({"arms": list(arms), **base, **sections})

    return make


def named(spec, checked, name):
    (arm,) = [arm for arm in arms_of(spec, checked.n_layers) if arm.name == name]
    return arm


def test_a_study_that_works(study):
    methods = ["lora", "lora+", "dora", "rslora", "full", "supertuning", "super", "last:2"]
    spec = study(*methods, train={"batch_size": 10, "epochs": 2})
    checked = check(spec, may_fetch=False)
    assert (checked.problems, checked.unchecked) == ([], [])
    assert checked.n_layers == checked.facts["n_layers"] == 3
    assert checked.n_rows == {"train": 43, "dev": 2}
    assert checked.facts["dtype"] == "float32"
    assert checked.identity.keys() == {"data_sha256", "model_revision", "n_layers", "dtype"}
    arm = named(spec, checked, "lora")
    assert checked.n_steps(arm.settings) == 2 * 5
    assert checked.n_trainable(named(spec, checked, "super")) is None


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trained_weights_are_counted_as_they_are(method, family, study):
    spec = study({"name": "a", "method": method, "layers": "1,2"}, family=family)
    checked = check(spec, may_fetch=False)
    arm = named(spec, checked, "a")
    loaded = load_model(spec.model)
    adapted = adapt(loaded.model, arm.settings.adapter, [1, 2], seed=0, n_steps=20)
    n_trainable = sum(parameter.numel() for parameter in adapted.parameters.values())
    assert checked.n_trainable(arm, 20) == n_trainable > 0


def test_a_skeleton_has_the_shapes_of_the_model(model_folder, study):
    spec = study("lora").model
    skeleton, loaded = load_skeleton(spec), load_model(spec)
    shapes = [{n: p.shape for n, p in m.model.named_parameters()} for m in (skeleton, loaded)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}
    assert skeleton.tokenizer("abc").input_ids == loaded.tokenizer("abc").input_ids
    assert replace(skeleton, model=None, tokenizer=None) == replace(
        loaded, model=None, tokenizer=None
    )


def test_all_problems_with_model_and_data_come_at_once(study):
    spec = study(
        "lora",
        {"name": "wide", "rank": 25},
        {"name": "high", "layers": "1,7"},
        {"name": "lost", "adapter.targets": ["c_attn"]},
        {"name": "found", "layers": "super", "rank": 999},
        {"name": "short", "method": "adalora", "train.max_steps": 2},
        data={"name": "/nowhere.jsonl"},
    )
    problems = check(spec, may_fetch=False).problems
    assert [problem.split(": ")[0] for problem in problems] == [
        *("data", "arm wide", "arm high", "arm lost", "arm found", "arm short")
    ]
    assert "rank 25" in problems[1] and "layer 7 does not exist" in problems[2]
    assert "no projection is called 'c_attn'" in problems[3]
    assert "at least 6 optimizer steps" in problems[5]


def test_short_runs_may_be_too_short_for_a_method(study):
    arm = {"name": "adalora", "train.max_steps": 30, "epochs": 9}
    train = {"batch_size": 8}
    assert not check(study(arm, train=train, rate={"train_rows": 20}), may_fetch=False).problems
    (problem,) = check(study(arm, train=train, rate={"max_steps": 5}), may_fetch=False).problems
    assert "this training has 5" in problem


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"name": "ROWS", "prompt_column": "question"}}, "question"),
        ({"data": {"name": "ROWS", "eval_split": "test"}}, "no test split"),
        ({"decode": {"max_new_tokens": 400}}, "context of 256"),
        ({"beam": {"arms": "lora", "decode": {"max_new_tokens": 400}}}, "context of 256"),
        ({"model": {"name": "/no/such/folder"}}, "model: there is no model folder"),
    ],
)
def test_single_mistakes(sections, said, study, rows):
    for section in sections.values():
        if section.get("name") == "ROWS":
            section["name"] = str(rows)
    (problem,) = check(study("lora", **sections), may_fetch=False).problems
    assert said in problem


def test_rows_that_are_too_long(study, rows):
    with rows.open("a") as file:  # the last prompts are the dev split
        file.write(json.dumps({"prompt": "p", "completion": "x" * 300}) + "\n")
    (problem,) = check(study("lora"), may_fetch=False).problems
    assert problem.startswith(f"data: dev split: {rows}, line 46 has 302 tokens, 1 of prompt and ")


def test_one_rate_needs_no_dev_split(study):
    sections = {"data": {"name": "sample", "eval_split": "test", "truncate": True}}
    one = check(study("lora", rate={"grid": [1]}, **sections), may_fetch=False)
    several = check(study("lora", **sections), may_fetch=False)
    assert one.problems == several.problems == []
    assert (set(one.n_rows), set(several.n_rows)) == ({"train", "test"}, {"train", "test", "dev"})


def test_what_the_hub_has_is_not_replaced(study, monkeypatch):
    monkeypatch.delenv("SWLORA_E2E", raising=False)
    spec = StudySpec.model_validate({"arms": ["lora"]})
    assert spec.model.name == DEFAULT_MODEL
    checked = check(spec, may_fetch=True)
    assert checked.problems == []
    model, data = checked.unchecked
    assert model.startswith(f"the model: {DEFAULT_MODEL} is not cached")
    assert data.startswith(f"the data: {DEFAULT_DATASET} cannot be loaded, since the Hub cannot be")
    assert (checked.n_layers, checked.n_rows) == (None, {})


def test_the_embedded_model_is_not_unpacked_to_look_at_it():
    spec = StudySpec.model_validate({"arms": ["lora"], "model": {"name": "builtin"}})
    assert check(spec, may_fetch=False).unchecked[0].startswith("the model: the embedded one")


def test_long_prompts_are_cut_where_it_was_asked_for(study, rows):
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "p" * 300, "completion": "x"}) + "\n")
    data = {"name": str(rows), "truncate": True}
    assert check(study("lora", data=data), may_fetch=False).problems == []


def test_documents_have_nothing_to_compare(study, tmp_path):
    path = write_rows(tmp_path / "texts.jsonl", [{"text": f"Text {k}."} for k in range(45)])
    (problem,) = check(study("lora", data={"name": str(path)}), may_fetch=False).problems
    assert problem == (
        "data: dev split: documents have no prompts, and a study compares texts: name rows with "
        "prompts"
    )
