"""A whole study with processes that only pretend: its order, its memory, its end."""

import json

import pytest
import yaml

from swlora.errors import RunFailedError, UserError
from swlora.study import compare as study
from swlora.study.compare import Request
from swlora.study.folder import differences

ARMS = ["lora", "super", "super-random-1", "super-last", "fixed"]


def facts(tmp_path):
    return json.loads((tmp_path / "out" / "study.json").read_text())


def test_a_study_from_beginning_to_end(compare, request_of, children, tmp_path, view):
    children.acts = {
        "identify/super": {"layers": [1]},
        **{f"rates/{arm}/0.1": {"nll": 0.5} for arm in ("lora", "super")},
    }
    result = compare(request_of())
    # last:1 of three layers is every:1, so one draw of random:1 is left
    assert children.ran() == [
        "identify/super",
        *(f"rates/{arm}/{rate}" for arm in ARMS[:4] for rate in (0.5, 0.1)),
        *(f"runs/{arm}/seed-0" for arm in ARMS[:4]),
        *(f"runs/{arm}/seed-5" for arm in ARMS),
        *("beam/lora/seed-5", "beam/fixed/seed-5"),
    ]
    told = facts(tmp_path)
    assert told["status"] == "done" == result.status
    assert told["arms"]["lora"]["rate"] == {
        "grid": [0.5, 0.1],
        "nll": {"0.5": 1.0, "0.1": 0.5},
        "chosen": 0.1,
        "at_edge": True,
        "cost_s": pytest.approx(told["arms"]["lora"]["rate"]["cost_s"]),
    }
    assert told["arms"]["lora"]["learning_rate"] == 0.1
    assert told["arms"]["super-random-1"]["learning_rate"] == 0.5  # the first of equal ones
    assert told["arms"]["fixed"]["rate"] is None
    found = told["arms"]["super"]
    assert (found["layers"], found["one_off_s"]) == ([1], 2.5)
    assert found["controls"] == ["super-random-1", "super-last"]
    assert told["arms"]["super-random-1"]["control_of"] == "super"
    assert len({told["arms"][name]["n_trainable"] for name in ARMS[1:]}) == 1
    assert set(told["phases_s"]) == {"identify", "rates", "runs", "beam"}
    assert told["n_rows"] == {"train": 43, "dev": 2}
    assert view.is_closed
    config = yaml.safe_load((tmp_path / "out/runs/super/seed-5/config.yaml").read_text())
    assert (config["adapter"]["layers"], config["seed"]) == ("1", 5)
    assert config["train"]["learning_rate"] == 0.1
    beam = yaml.safe_load((tmp_path / "out/beam/fixed/seed-5/config.yaml").read_text())
    assert beam["decode"]["num_beams"] == 10
    assert not (tmp_path / "out" / ".cache").exists()


def test_the_same_again_runs_nothing(compare, request_of, children, tmp_path):
    compare(request_of())
    children.ran()
    before = facts(tmp_path)
    compare(request_of())
    assert children.ran() == []
    after = facts(tmp_path)
    assert after == before


def test_a_failed_run_does_not_stop_the_others(compare, request_of, children, tmp_path):
    children.acts = {"runs/lora/seed-0": {"fail": "RunFailedError: no more space"}}
    no_space = r"not done: runs/lora/seed-0: RunFailedError: no more space; the same command"
    with pytest.raises(study.NotDoneError, match=no_space) as failed:
        compare(request_of(only=["lora", "fixed"]))
    assert failed.value.compared.status == "incomplete"
    assert children.ran()[-2:] == ["beam/lora/seed-5", "beam/fixed/seed-5"]
    told = facts(tmp_path)
    assert told["status"] == "incomplete"
    assert told["runs"]["runs/lora/seed-0"]["status"] == "failed"
    assert (tmp_path / "out" / "results.md").exists()
    children.acts = {}
    compare(request_of(only=["lora", "fixed"]))
    assert children.ran() == ["runs/lora/seed-0"]
    assert facts(tmp_path)["status"] == "incomplete"  # super has not run
    compare(request_of())
    assert facts(tmp_path)["status"] == "done"


def test_a_model_without_super_weights_is_an_answer(compare, request_of, children, tmp_path):
    children.acts = {"identify/super": {"layers": [], "reason": "no super weight was verified"}}
    compare(request_of())
    assert not any("super" in place for place in children.ran() if place != "identify/super")
    told = facts(tmp_path)
    assert told["status"] == "done"
    assert (told["arms"]["super"]["layers"], told["arms"]["super"]["reason"]) == (
        *([], "no super weight was verified"),
    )


def test_layers_that_could_not_be_looked_for(compare, request_of, children, tmp_path):
    children.acts = {"identify/super": {"fail": "RunFailedError: broken"}}
    with pytest.raises(RunFailedError, match="super: no layers for super: RunFailedError: broken"):
        compare(request_of())
    children.acts = {}
    compare(request_of())
    assert facts(tmp_path)["arms"]["super"]["layers"] == [1]
    assert facts(tmp_path)["status"] == "done"


def test_only_a_control_needs_the_layers_of_its_arm(compare, request_of, children):
    compare(request_of(only=["super-last"], beam={}))
    assert children.ran() == [
        *("identify/super", "rates/super-last/0.5", "rates/super-last/0.1"),
        *("runs/super-last/seed-0", "runs/super-last/seed-5"),
    ]


def test_a_control_that_another_one_serves_as(compare, request_of, children, view):
    compare(request_of(only=["super-every"], beam={}))
    assert "runs/super-last/seed-0" in children.ran()
    assert "super-every: super-last has the same layers and serves as it" in view.lines


def test_an_arm_that_found_the_layers_of_another_one_does_not_run(
    compare, request_of, children, tmp_path, view
):
    """`auto` finds all layers in a short training, say: that is the arm of all layers again."""
    children.acts = {"identify/super": {"layers": [0, 1, 2]}}
    compare(request_of(only=["super"], beam={}))
    assert children.ran() == [
        *("identify/super", "rates/lora/0.5", "rates/lora/0.1"),
        *("runs/lora/seed-0", "runs/lora/seed-5"),
    ]
    assert "super: lora has the same layers and serves as it" in view.lines
    assert compare(request_of(beam={})).status == "done"
    assert children.ran() == ["runs/fixed/seed-5"]
    assert facts(tmp_path)["arms"]["super"]["same_as"] == "lora"
    assert facts(tmp_path)["arms"]["lora"]["same_as"] is None


def test_controls_that_have_not_run_are_not_forgotten(compare, request_of, children, tmp_path):
    compare(request_of(only=["lora", "super", "fixed"]))
    found = facts(tmp_path)["arms"]["super"]
    compare(request_of(only=["lora"]))
    assert facts(tmp_path)["status"] == "incomplete"
    assert facts(tmp_path)["arms"]["super"] == found
    children.ran()
    compare(request_of())
    assert all("super-" in place for place in children.ran())
    assert facts(tmp_path)["status"] == "done"


def test_an_interrupted_study_goes_on(compare, request_of, children, view, tmp_path):
    children.acts = {"runs/lora/seed-0": {"hang": True}}
    view.stop_at = "hanging"
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        compare(request_of(only=["lora"]))
    told, published = facts(tmp_path), json.loads((tmp_path / "out/results.json").read_text())
    assert told["status"] == published["status"] == "cancelled"
    assert "runs/lora/seed-0" in [run["run"] for run in published["unfinished"]]
    assert (tmp_path / "out/results.md").exists()
    assert told["runs"]["runs/lora/seed-0"]["status"] == "cancelled"
    assert view.is_closed
    children.ran()
    view.stop_at = None
    compare(request_of(only=["lora"]))
    assert children.ran() == ["runs/lora/seed-0", "runs/lora/seed-5", "beam/lora/seed-5"]


def test_arms_that_need_the_same_search_share_it(compare, request_of, children):
    """Whatever they train: super weights are the model's."""
    unlike = {"name": "whole", "layers": "super", "method": "full", "rates": [0.1]}
    children.acts = {"identify/super": {"layers": [1]}}
    arms = ["lora", "super", {"name": "wide", "layers": "super", "rank": 3}, unlike]
    compare(request_of(arms=arms, beam={}, overrides={"controls": False}))
    assert children.ran().count("identify/super") == 1
    compare(request_of(arms=arms, beam={}, overrides={"controls": False}))
    assert children.ran() == []


def test_another_study_in_the_folder_is_told_by_what_differs(compare, request_of):
    compare(request_of(arms=["lora"], beam={}))
    other = request_of(arms=["lora", "dora"], seeds=[0], beam={}, overrides={"controls": False})
    for attempt in (compare, study.plan):
        with pytest.raises(UserError, match="holds another study") as caught:
            attempt(other)
        for part in ("seeds: [0, 5] there, [0] here", "controls: True there", "arms.dora"):
            assert part in str(caught.value)


def test_other_rows_under_the_same_name_are_refused(compare, request_of, tmp_path):
    compare(request_of(arms=["lora"], beam={}))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "new\n", "completion": "row"}) + "\n")
    with pytest.raises(UserError, match="this study cannot go on: data_sha256"):
        compare(request_of(arms=["lora"], beam={}))


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_folder_of_something_else(name, compare, request_of, tmp_path):
    if name == "folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
    else:
        (tmp_path / "out").touch()
    with pytest.raises(UserError, match="choose another --output"):
        compare(request_of())


def test_nothing_runs_where_something_is_wrong(compare, request_of, children, tmp_path):
    arms = ["lora", {"name": "wide", "rank": 999}, {"name": "high", "layers": "77"}, "nonsense"]
    with pytest.raises(UserError) as caught:
        compare(request_of(arms=arms, baseline="gone"))
    for part in ("arm wide: ", "arm high: layer 77", "arm nonsense: ", "baseline: there is no arm"):
        assert part in str(caught.value)
    assert (children.calls, (tmp_path / "out").exists()) == ([], False)


def test_what_is_not_at_hand_is_refused(compare, request_of, children, monkeypatch):
    with pytest.raises(UserError, match="not at hand: the model: org/absent is not cached"):
        compare(request_of(model={"name": "org/absent"}))
    assert children.calls == []


def test_several_models_have_a_folder_each(compare, request_of, settings, tmp_path, children):
    first = settings.pop("model")
    (tmp_path / "copy").symlink_to(first["name"])
    models = [first, {"name": str(tmp_path / "copy"), "dtype": "float32"}]
    path = tmp_path / "study.yaml"
    content = settings | {"models": models, "arms": ["lora"], "beam": {}, "seeds": [0]}
    path.write_text(yaml.safe_dump(content))
    result = compare(Request(path, tmp_path / "out"))
    names = [str(tmp_path / "out" / n) for n in (first["name"].rpartition("/")[2], "copy")]
    assert list(result.studies) == names


# The plan


def test_a_plan_runs_nothing(request_of, tmp_path, children):
    (plan,) = study.plan(request_of()).studies
    names = ["lora", "super", "super-random-1", "super-random-2", "super-last", "super-every"]
    assert [arm.name for arm in plan.arms] == [*names, "fixed"]
    assert (plan.n_runs, plan.n_short_runs, plan.n_beam_runs) == (13, 12, 2)
    lora, found, *_, fixed = plan.arms
    assert (lora.layers, found.layers, fixed.layers) == ([0, 1, 2], None, [0])
    assert lora.n_trainable == 3 * fixed.n_trainable > 0
    assert lora.n_steps == 2
    assert not (tmp_path / "out").exists()


def test_a_plan_of_some_arms(request_of):
    (plan,) = study.plan(request_of(only=["lora,fixed"])).studies
    assert [arm.name for arm in plan.arms] == ["lora", "fixed"]
    with pytest.raises(UserError, match="--only gone"):
        study.plan(request_of(only=["gone"]))


def test_a_plan_says_what_was_not_checked(request_of):
    (plan,) = study.plan(request_of(model={"name": "org/absent"})).studies
    assert "org/absent is not cached" in plan.unchecked[0]
    assert plan.arms[0].layers is None
    assert plan.arms[0].n_steps == 2


def test_a_new_setting_that_is_left_open_makes_no_other_study():
    before = {"arms": [{"name": "a"}, {"name": "b"}]}
    now = {"arms": [{"name": "a", "control_seeds": None}, {"name": "b", "control_seeds": None}]}
    assert differences(before, now) == []
    assert differences(before, {"arms": now["arms"][::-1]}) == ["arms: another order"]
    now["arms"][1]["control_seeds"] = [3]
    assert differences(before, now) == ["arms.b.control_seeds: nothing there, [3] here"]
