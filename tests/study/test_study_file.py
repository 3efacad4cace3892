"""A study file: short forms, arms as configurations of runs, and every problem at once."""

import pytest
import yaml

from swlora.config import TrainSpec, dump_yaml, load_spec
from swlora.errors import UserError
from swlora.study.arms import arms_of
from swlora.study.plan import rate_tasks
from swlora.study.spec import StudySpec
from swlora.study.study_file import read_studies


def read(tmp_path, text, overrides=None):
    """The only study of a file."""
    path = tmp_path / "s.yaml"
    path.write_text(text)
    (study,) = read_studies(path, overrides or {})
    return study


def arms(tmp_path, text):
    study = read(tmp_path, text)
    assert not study.problems
    assert study.spec is not None
    return {arm.name: study.spec.run_spec(arm.overrides) for arm in study.spec.arms}


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("{}", (32, 0, None)),
        ("{batch_size: 5, eval_every_steps: 7}", (5, 7, None)),
        ("{early_stopping: 2}", (32, None, 2)),
        ("{sample_prompts: [Good day]}", (32, None, None)),
        ("{sample_prompts: [Good day], eval_every_steps: 7, eval_rows: 3}", (32, 7, None)),
    ],
)
def test_what_a_run_would_choose_by_its_data_is_fixed(tmp_path, train, expected):
    """All runs of a study take equal steps; the short ones measure nothing on the way."""
    study = read(tmp_path, f"train: {train}\narms: [lora]\nrate: {{grid: [0.1, 0.2]}}")
    (arm,) = arms_of(study.spec, 3)
    settings = arm.run_spec(seed=0, rate=0.1).train
    assert (settings.batch_size, settings.eval_every_steps, settings.early_stopping) == expected
    short = [task.spec for task in rate_tasks(arm, study.spec, n_train_rows=57)]
    assert len(short) == 2
    for run in short:
        assert (run.train.batch_size, run.train.eval_every_steps) == (expected[0], 0)
        assert run.train.sample_prompts == []
        assert load_spec(None, run.model_dump(mode="json")) == run  # as its child reads it


@pytest.mark.parametrize(
    ("train", "own", "expected"),
    [
        ("{}", "train.early_stopping: 2", None),
        ("{}", "train.sample_prompts: [Good day]", None),
        ("{}", "train.eval_rows: 3, train.eval_every_steps: 4", 4),
        ("{eval_every_steps: 7}", "train.eval_rows: 3", 7),
    ],
)
def test_an_arm_alone_asks_for_something_of_held_out_rows(train, own, expected, tmp_path):
    """It is refused for no setting that the file does not have; the others measure as before."""
    found = arms(tmp_path, f"train: {train}\narms: [lora, {{name: own, layers: all, {own}}}]")
    assert found["own"].train.eval_every_steps == expected
    assert found["lora"].train.eval_every_steps == (expected if train != "{}" else 0)


def test_layers_are_tried_at_a_rate_of_the_arms_method(tmp_path):
    """`full` at LoRA's rate would have its trials, which are of LoRA, at 20 times theirs."""
    text = "arms: [lora, full, {name: a, method: adalora, layers: 'auto:0.5'}]"
    rates = {name: run.train.learning_rate for name, run in arms(tmp_path, text).items()}
    assert rates == {"lora": 2e-3, "full": 1e-4, "a": 1.6e-2}


# Short forms


def test_a_bare_name_is_a_method_or_a_policy(tmp_path):
    text = "adapter: {rank: 8, layers: 'first:2'}\narms: [lora, dora, super, 'last:3', '2,11']"
    found = {
        n: (run.adapter.method, str(run.adapter.layers)) for n, run in arms(tmp_path, text).items()
    }
    assert found == {
        "lora": ("lora", "first:2"),
        "dora": ("dora", "first:2"),
        "super": ("lora", "super"),
        "last-3": ("lora", "last:3"),
        "layers-2-11": ("lora", "2,11"),
    }


def test_settings_beside_a_name(tmp_path):
    text = """
adapter: {alpha: 16}
arms:
  - lora
  - {name: dora, layers: super}
  - {name: super, method: rslora, rank: 2}
  - {name: "null", method: lora, epochs: null}
  - {name: mine, layers: [1, 2], epochs: 3, train.weight_decay: 0.25, rates: [1], seeds: [7]}
"""
    found = arms(tmp_path, text)
    assert (found["dora"].adapter.method, str(found["dora"].adapter.layers)) == ("dora", "super")
    assert (found["super"].adapter.method, str(found["super"].adapter.layers)) == (
        "rslora",
        "super",
    )
    assert found["super"].adapter.rank == 2
    fixed = {"batch_size": 32, "eval_every_steps": 0, "learning_rate": 2e-3}
    assert found["lora"].train == TrainSpec(epochs=1, **fixed)
    assert found["null"].train == TrainSpec(epochs=1, **fixed)
    assert found["mine"].train == TrainSpec(epochs=3, weight_decay=0.25, **fixed)
    assert (str(found["mine"].adapter.layers), found["mine"].adapter.alpha) == ("1,2", 16)


def test_settings_that_a_method_lacks_are_not_handed_to_it(tmp_path):
    found = arms(tmp_path, "adapter: {rank: 8, alpha: 3, targets: [x]}\narms: [lora, full]")
    assert (found["lora"].adapter.rank, found["full"].adapter.rank) == (8, 4)
    assert found["full"].adapter.targets == ["x"]


def test_several_models_are_several_studies(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text("models: [org/one, {name: other/two/, dtype: float32}]\narms: [lora]")
    one, two = read_studies(path, {})
    assert (one.name, two.name) == ("one", "two")
    assert (one.spec.model.name, two.spec.model.dtype) == ("org/one", "float32")
    assert one.spec.arms == two.spec.arms


@pytest.mark.parametrize(
    "text", ["models: [a/x, b/x]", "models: 3", "models: []", "models: [a]\nmodel: {name: b}"]
)
def test_models_that_are_no_list_of_different_ones(text, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(f"{text}\narms: [lora]")
    with pytest.raises(UserError, match="models: "):
        read_studies(path, {})


def test_what_is_resolved_is_read_back_to_the_same(tmp_path):
    text = "arms: [lora, {name: top, layers: 'last:2', train.epochs: 2, rates: [0.1]}]\nseeds: [3]"
    spec = read(tmp_path, text).spec
    again = read(tmp_path, dump_yaml(spec))
    assert (again.spec, again.problems) == (spec, [])
    assert StudySpec.model_validate(yaml.safe_load(dump_yaml(spec))) == spec


def test_overrides_win(tmp_path):
    assert read(tmp_path, "arms: [lora]", {"controls": None}).spec.controls
    assert not read(tmp_path, "arms: [lora]", {"controls": False}).spec.controls


# Problems


def test_all_problems_of_a_file_come_at_once(tmp_path):
    study = read(
        tmp_path,
        """
model: {name: builtin, nmae: x}
seeds: [1, 1]
rate: {grid: [0.1, -1], eval_prompts: 3}
baseline: lroa
beam: {arms: [lora, gone], seeds: [9]}
surprise: 1
train: {schedule: constant}
arms:
  - lora
  - nonsense
  - {name: a/b, rank: 3}
  - {name: unknown, method: xora}
  - {name: extra, colour: red}
  - {name: thin, rank: 0}
  - {name: own, train.batch_size: 4, data.train_rows: 3}
  - {name: policy, layers: most}
  - {name: budget, layers: auto:2}
  - {name: odd, overrides: 3}
  - 7
  - {name: twice, rank: 3}
  - {name: twice, rank: 4}
  - {name: steady, train.schedule: constant}
  - {name: same, rates: [0.001, 0.0010000001]}
""",
    )
    wanted = [
        "model.nmae: there is no such setting (do you mean model.name?)",
        "seeds: a value is listed twice",
        "rate.grid.1: ",
        "surprise: there is no such setting",
        "arm nonsense: 'nonsense' is neither a method",
        "arm a/b: name: ",
        "arm extra: colour: there is no such setting",
        "arm odd: overrides: ",
        "arm number 11: ",
        "arm same: rates: a rate is listed twice; six digits of it count",
        "baseline: there is no arm 'lroa'",
        "beam: there is no arm 'gone'",
        "beam: no arm has seed 9",
        "arm unknown: adapter.method: ",
        "arm thin: adapter.rank: ",
        "arm own: train.batch_size: cannot be an arm's own",
        "arm own: data.train_rows: an arm changes settings of adapter and train only",
        "arm policy: adapter.layers: 'most' is not understood",
        "arm budget: adapter.layers: 'auto:2' is not understood",
        "arm twice: listed twice",
        "train.schedule: constant",
        "arm steady: train.schedule: constant",
    ]
    for line in wanted:
        assert sum(problem.startswith(line) for problem in study.problems) == 1, (line, study)
    assert len(study.problems) == len(wanted), study.problems
    assert study.spec.model.name == "builtin"  # what is right is kept, and looked at further
    assert study.spec.rate.eval_prompts == 3


def test_a_wrong_arm_is_not_also_missing(tmp_path):
    study = read(tmp_path, "baseline: base\narms: [{name: base, glow: red}, lora]")
    assert study.problems == ["arm base: glow: there is no such setting"]


@pytest.mark.parametrize("text", ["seeds: [0]", "arms: []", "arms: 3", "arms: [nonsense]"])
def test_a_file_without_any_arm(text, tmp_path):
    study = read(tmp_path, text)
    assert study.spec is None
    assert study.problems


def test_a_learning_rate_for_all_arms_is_refused(tmp_path):
    as_older_versions_wrote_it = read(tmp_path, "train: {learning_rate: 0.002}\narms: [lora]")
    assert not as_older_versions_wrote_it.problems
    assert as_older_versions_wrote_it.spec == read(tmp_path, "arms: [lora]").spec
    problems = read(tmp_path, "train: {learning_rate: 0.5}\narms: [lora]").problems
    assert problems == ["train.learning_rate: a study chooses it; give rate.grid"]
    (problem,) = read(tmp_path, "arms: [lora, {name: x, train.learning_rate: 1}]").problems
    assert "give the arm `rates`" in problem


def test_finding_a_rate_is_left_to_the_study(tmp_path):
    (problem,) = read(tmp_path, "train: {find_learning_rate: true}\narms: [lora]").problems
    assert problem == "train.find_learning_rate: a study tries the rates of rate.grid itself"
    text = "arms: [lora, {name: x, train.find_learning_rate: true}]"
    (problem,) = read(tmp_path, text).problems
    assert problem.endswith("a study tries the `rates` of an arm itself")


@pytest.mark.parametrize(
    ("seeds", "rate", "seed"),
    [
        ("seeds: [0, 1]", "rate: {seed: 1}", 1),
        ("seeds: [1000]", "margin: {nll: 0.1}", 1000),
        ("seeds: [0]", "rate: {grid: [0.1, 0.2], seed: 7}", 7),  # of an arm's controls
    ],
)
def test_rates_are_chosen_with_a_seed_of_their_own(tmp_path, seeds, rate, seed):
    arms = "arms: [lora, {name: super, control_seeds: [7]}]"
    expected = [f"rate.seed: {seed} is a seed of an arm; take one that none has"]
    assert read(tmp_path, f"{arms}\n{seeds}\n{rate}").problems == expected
    given = "arms: [{name: lora, rates: [0.1]}]"  # there is nothing to choose
    assert read(tmp_path, f"{given}\n{seeds}\n{rate}").problems == []


def test_seeds_of_controls_that_an_arm_does_not_have_are_refused(tmp_path):
    arms = (
        "[lora, {name: top, layers: last:2, control_seeds: [0]}, {name: super, control_seeds: [7]}]"
    )
    study = read(tmp_path, f"arms: {arms}\nbeam: {{arms: [super], seeds: [7]}}")
    assert study.problems == [
        "arm top: control_seeds: it has no controls, which layers that are found have"
    ]


def test_an_extension_without_a_grid_is_refused(tmp_path):
    text = "arms: [{name: lora, rates: [0.1]}, dora]\nrate: {extend: 2, grid: [%s]}"
    assert read(tmp_path, text % "0.1, 0.2").problems == []
    (problem,) = read(tmp_path, text % "0.1").problems
    assert problem.startswith("rate.extend: no arm has several rates")
