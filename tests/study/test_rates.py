"""How the learning rates of a study's arms are chosen, with processes that only pretend."""

import json
import shutil

import pytest
import yaml

from swlora.errors import DivergedError, RunFailedError, UserError
from swlora.study.compare import plan
from swlora.study.overview import show_plans
from swlora.study.plan import is_at_edge, rate_beyond
from swlora.study.runner import Runner

DIVERGED = {"fail": "the loss", "error": {"code": DivergedError.code, "message": "the loss"}}


@pytest.fixture
def lora(request_of):
    """A function (extend, **changes) -> request of one arm with the rates 0.5 and 0.1."""

    def make(extend=0, **changes):
        rate = {"grid": [0.5, 0.1], "train_rows": 20, "extend": extend}
        return request_of(**{"arms": ["lora"], "beam": {}, "seeds": [0], "rate": rate} | changes)

    return make


@pytest.fixture
def falling(children):
    """Give lower rates of three arms lower losses, down to 0.004."""
    losses = {"0.5": 0.9, "0.1": 0.8, "0.02": 0.7, "0.004": 0.6}
    children.acts = {
        f"rates/{arm}/{rate}": {"nll": nll}
        for arm in ("lora", "a", "b")
        for rate, nll in losses.items()
    }


def arm_facts(tmp_path, name="lora"):
    return json.loads((tmp_path / "out" / "study.json").read_text())["arms"][name]


def test_rates_are_chosen_on_a_slice_of_other_rows(compare, lora, tmp_path):
    compare(lora())
    config = yaml.safe_load((tmp_path / "out/rates/lora/0.5/config.yaml").read_text())
    assert (config["data"]["train_rows"], config["data"]["eval_prompts"]) == (20, 64)
    assert (config["data"]["eval_split"], config["seed"]) == ("dev", 1000)
    assert config["train"]["learning_rate"] == 0.5


def test_an_arm_without_a_rate_is_left_behind(compare, request_of, children, tmp_path):
    too_high = {"fail": "RunFailedError: the loss is not finite at step 1"}
    children.acts = {f"rates/lora/{rate}": too_high for rate in (0.5, 0.1)}
    children.acts["rates/super/0.5"] = too_high
    with pytest.raises(RunFailedError, match=r"lora: each of its rates diverged \(0\.5, 0\.1\)"):
        compare(request_of())
    assert not any(place.startswith("runs/lora") for place in children.ran())
    assert arm_facts(tmp_path, "super")["rate"]["nll"] == {"0.5": None, "0.1": 1.0}
    assert arm_facts(tmp_path, "super")["learning_rate"] == 0.1
    assert arm_facts(tmp_path)["learning_rate"] is None


def test_a_rate_that_could_not_be_tried_is_no_choice(compare, lora, children):
    children.acts = {"rates/lora/0.5": {"fail": "RunFailedError: no more space"}}
    with pytest.raises(RunFailedError, match=r"lora: the rate 0\.5 could not be tried"):
        compare(lora())
    children.acts = {}
    children.ran()
    compare(lora())
    assert children.ran() == ["rates/lora/0.5", "runs/lora/seed-0"]


def test_a_result_that_is_damaged_says_what_to_do(compare, lora, tmp_path):
    compare(lora())
    (tmp_path / "out/rates/lora/0.1/result.json").write_text("{}")
    with pytest.raises(UserError, match=r"0\.1/result\.json cannot be read; remove its folder"):
        compare(lora())


def test_a_study_without_rates_tries_those_of_methods_and_found_layers(
    compare, lora, children, tmp_path
):
    arms = ["lora", "super", {"name": "full", "method": "full", "layers": "0"}]
    children.acts = {"identify/super": {"layers": [0, 1]}}
    compare(lora(arms=arms, rate={"train_rows": 20}, random_draws=1, overrides={"controls": False}))
    grids = {arm: arm_facts(tmp_path, arm)["rate"]["grid"] for arm in ("lora", "super", "full")}
    assert grids == {
        "lora": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        "super": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],  # two of three layers
        "full": [4.4e-5, 8.7e-5, 1.7e-4, 3.5e-4, 7e-4],  # one of three
    }
    assert children.ran()[1:4] == [f"rates/lora/{r}" for r in ("0.0005", "0.001", "0.002")]


def test_open_rates_are_those_with_which_an_arm_began(
    compare, lora, monkeypatch, children, tmp_path
):
    """A version that tries others does not mix them into what is there, but for other layers."""
    arms = ["lora", "super"]
    request = lora(arms=arms, rate={"train_rows": 20}, random_draws=1)
    children.acts = {"identify/super": {"layers": [1]}}
    compare(request)
    began = arm_facts(tmp_path)["rate"]["grid"]
    children.ran()
    monkeypatch.setattr("swlora.study.arms.RATE_STEPS", (3, 5))
    compare(request)
    assert children.ran() == []
    for folder in ("identify/super", "rates/super", "runs/super"):
        shutil.rmtree(tmp_path / "out" / folder)
    children.acts = {"identify/super": {"layers": [0, 1]}}
    compare(lora(arms=arms, rate={"train_rows": 20}, random_draws=1, only=["lora", "super"]))
    ran = children.ran()
    assert [place for place in ran if "rates/" in place] == [
        *("rates/super/0.0036", "rates/super/0.006")
    ]
    assert arm_facts(tmp_path)["rate"]["grid"] == began


def test_a_plan_says_which_rates_are_not_known_yet(lora, capsys):
    arms = ["lora", "super", {"name": "own", "layers": "auto:0.5", "rates": [0.1, 0.2]}]
    plans = plan(lora(arms=arms, rate={"train_rows": 20}, random_draws=1))
    rates = {arm.name: arm.rates for arm in plans.studies[0].arms}
    assert rates == {
        "lora": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        **dict.fromkeys(["super", "super-random-1", "super-last", "super-every"]),
        **{name: [0.1, 0.2] for name in ("own", "own-random-1", "own-last", "own-every")},
    }
    show_plans(plans)
    line = next(line for line in capsys.readouterr().out.splitlines() if "super-last" in line)
    assert line.split()[-2:] == ["?", "0"]


def test_a_study_without_rates_of_an_older_version_goes_on_with_its_grid(
    compare, lora, children, tmp_path
):
    """Its study.yaml has the grid that was the default."""
    compare(lora(rate={"grid": [1e-3, 2e-3, 4e-3, 8e-3], "train_rows": 20}))
    children.ran()
    with pytest.raises(UserError, match=r"rate\.grid: \[0\.001, 0\.002, 0\.004, 0\.008\] there"):
        compare(lora(rate={"train_rows": 20}))
    compare(lora(rate={"grid": [1e-3, 2e-3, 4e-3, 8e-3], "train_rows": 20}))
    assert children.ran() == []


# Beyond the edge of a grid


@pytest.mark.parametrize(
    ("rates", "chosen", "beyond"),
    [
        ((1e-3, 2e-3, 4e-3), 2e-3, None),
        ((1e-3, 2e-3, 4e-3), 4e-3, 8e-3),
        ((4e-3, 1e-3, 2e-3), 1e-3, 5e-4),
        ((1e-2, 3e-2), 1e-2, 3.33e-3),
        ((1e-2,), 1e-2, None),
        ((1e-3, 1.002e-3), 1.002e-3, None),  # rounded, it is 1e-3 again
        ((1.0, 1.0099999), 1.0099999, 1.02),
        ((1.009, 1.0099999), 1.0099999, None),  # 1.01 is what the highest is called
        ((1e-200, 1.0), 1e-200, None),
        ((1e-200, 2e-200), 1e-200, 5e-201),
        ((1e-160, 1e160), 1e160, None),
    ],
)
def test_the_next_rate_is_as_far_away_as_the_last(rates, chosen, beyond):
    assert rate_beyond(rates, chosen) == beyond
    assert is_at_edge(rates, chosen) == (len(rates) > 1 and chosen != 2e-3)


def test_a_grid_whose_best_is_at_its_edge_is_extended(compare, lora, children, tmp_path, view):
    losses = {"0.5": 1.0, "0.1": 0.5, "0.02": 0.4, "0.004": 0.45}
    children.acts = {f"rates/lora/{rate}": {"nll": nll} for rate, nll in losses.items()}
    compare(lora(extend=3))
    assert [place for place in children.ran() if "rates/" in place] == list(children.acts)
    found = arm_facts(tmp_path)
    assert (found["learning_rate"], found["rate"]["at_edge"]) == (0.02, False)
    assert found["rate"]["grid"] == [0.5, 0.1, 0.02, 0.004]
    assert found["rate"]["nll"] == losses
    trying = [line for line in view.lines if "trying" in line]
    assert trying == [
        "lora: 0.1 is at the edge; trying 0.02",
        "lora: 0.02 is at the edge; trying 0.004",
    ]
    view.lines.clear()
    compare(lora(extend=3))
    assert children.ran() == []
    assert view.lines == ["lora: learning rate 0.02"]


@pytest.mark.usefixtures("falling")
def test_a_grid_is_extended_so_often_and_no_more(compare, lora, tmp_path):
    compare(lora(extend=1))
    found = arm_facts(tmp_path)
    assert (found["learning_rate"], found["rate"]["at_edge"]) == (0.02, True)
    assert found["rate"]["grid"] == [0.5, 0.1, 0.02]


@pytest.mark.usefixtures("falling")
def test_further_rates_of_all_arms_are_tried_together(compare, lora, monkeypatch):
    announced = []
    monkeypatch.setattr(
        Runner, "ahead", lambda _, tasks: announced.append([t.folder for t in tasks])
    )
    arms = ["lora", *({"name": name, "layers": "0"} for name in ("a", "b"))]
    compare(lora(extend=2, arms=arms))
    rounds = [("0.5", "0.1"), ("0.02",), ("0.004",)]
    assert [found for found in announced if found and found[0].startswith("rates/")] == [
        [f"rates/{arm}/{rate}" for arm in ("lora", "a", "b") for rate in rates] for rates in rounds
    ]


@pytest.mark.usefixtures("falling")
def test_a_further_rate_that_fails_costs_its_arm_that_rate_alone(
    compare, lora, children, tmp_path, view
):
    children.acts["rates/lora/0.004"] = {"fail": "RunFailedError: no\nmore space"}
    result = compare(lora(extend=3))
    found = arm_facts(tmp_path)
    assert (result.status, found["learning_rate"], found["reason"]) == ("done", 0.02, None)
    assert (found["rate"]["chosen"], found["rate"]["at_edge"]) == (0.02, True)
    assert found["rate"]["grid"] == [0.5, 0.1, 0.02]
    said = "lora: the further rate 0.004 could not be tried (RunFailedError: no more space): "
    assert sum(line.startswith(said) for line in view.lines) == 1
    report = (tmp_path / "out/results.md").read_text()
    assert sum(line.startswith(said) for line in report.splitlines()) == 1
    # Its runs have the rate that was chosen without: another choice now would not fit them
    children.acts["rates/lora/0.004"] = {"nll": 0.6}
    children.ran()
    compare(lora(extend=3))
    assert (children.ran(), arm_facts(tmp_path)) == ([], found)


def test_a_further_rate_that_diverges_has_shown_where_the_edge_is(
    compare, lora, children, tmp_path
):
    children.acts = {"rates/lora/0.5": {"nll": 0.5}, "rates/lora/2.5": DIVERGED}
    compare(lora(extend=3))
    found = arm_facts(tmp_path)["rate"]
    assert (found["chosen"], found["at_edge"]) == (0.5, False)
    assert found["nll"] == {"0.5": 0.5, "0.1": 1.0, "2.5": None}


def test_a_plan_says_how_many_further_rates_there_may_be(lora, capsys):
    fixed = {"name": "fixed", "layers": "0", "rates": [0.25]}
    show_plans(plan(lora(extend=3, arms=["lora", "dora", fixed])))
    said = "up to 3 further short runs of that arm, 6 in all at most"
    assert said in capsys.readouterr().out
