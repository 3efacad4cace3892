"""Arms and their controls: as many layers, everything else equal, nothing run twice."""

from dataclasses import replace

import pytest

from swlora.errors import UserError
from swlora.study.arms import add_controls, arms_of, expected_controls, same_runs, select_arms
from swlora.study.spec import StudySpec

N_LAYERS = 12


def study(*arms, **settings):
    return StudySpec.model_validate({"arms": list(arms), "seeds": [0, 4], **settings})


def found(spec, **layers):
    """The arms, with layers for those that are found by running the model."""
    arms = arms_of(spec, N_LAYERS)
    return [replace(a, layers=layers[a.name]) if a.name in layers else a for a in arms]


def test_counted_policies_are_layers_and_others_wait():
    arms = arms_of(study("lora", "last:2", "super", "auto:0.5"), N_LAYERS)
    assert [arm.layers for arm in arms] == [tuple(range(12)), (10, 11), None, None]
    assert [arm.layers for arm in arms_of(study("last:2"), None)] == [None]


def test_a_run_of_an_arm():
    spec = study({"name": "a", "layers": "last:2", "rank": 3, "rates": [0.5]})
    (arm,) = arms_of(spec, N_LAYERS)
    run = arm.run_spec(seed=4, rate=0.5)
    assert (run.seed, run.train.learning_rate) == (4, 0.5)
    assert (str(run.adapter.layers), run.adapter.rank) == ("10,11", 3)
    assert (arm.rates, arm.seeds) == ((0.5,), (0, 4))


@pytest.mark.parametrize(
    ("arm", "rates"),
    [
        ("lora", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
        ("full", (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)),
        ("adalora", (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)),
        ({"name": "lora+", "adapter.lora_plus_ratio": 8}, (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)),
        ("last:3", (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),  # a quarter of the layers
        (
            {"name": "top", "layers": "7,8,11", "method": "pissa"},
            (3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3),
        ),
    ],
)
def test_open_rates_are_multiples_of_the_default_of_method_and_layers(arm, rates):
    (found,) = arms_of(study(arm), N_LAYERS)
    assert found.rates == rates and found.has_rates
    (given,) = arms_of(study(arm, rate={"grid": [0.1, 0.2]}), N_LAYERS)
    assert given.rates == (0.1, 0.2)


def test_open_rates_of_found_layers_are_those_of_as_many():
    spec = study("super", "auto:0.5", "every:3")
    layers = {"super": (2, 3, 5), "auto-0.5": (4, 5, 9)}
    arms, controls = add_controls(found(spec, **layers), spec, N_LAYERS)
    assert {arm.rates for arm in arms} == {(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)}
    assert controls["super"]["super-every"] == controls["auto-0.5"]["auto-0.5-every"] == "every-3"


def test_open_rates_are_not_final_before_the_layers_are_known():
    for n_layers in (N_LAYERS, None):
        spec = study("super", {"name": "own", "layers": "super", "rates": [0.1, 0.2]})
        open_one, own = arms_of(spec, n_layers)
        assert not open_one.has_rates and own.has_rates
        assert not any(control.has_rates for control in expected_controls(open_one, spec))
        assert len(open_one.rates) == len(arms_of(study("lora"), N_LAYERS)[0].rates)
    assert not arms_of(study("last:2"), None)[0].has_rates


def test_controls_of_a_found_arm():
    spec = study("lora", {"name": "super", "rank": 5, "epochs": 2, "seeds": [4]}, random_draws=3)
    arms, controls = add_controls(found(spec, super=(1, 3, 8)), spec, N_LAYERS)
    names = ["super-random-1", "super-random-2", "super-random-3", "super-last", "super-every"]
    assert [arm.name for arm in arms] == ["lora", "super", *names]
    assert controls == {"super": {name: name for name in names}}
    for arm in arms[2:]:
        assert arm.control_of == "super"
        assert len(arm.layers) == 3
        assert list(arm.layers) == arm.policy.resolve(N_LAYERS)
        assert (arm.seeds, arm.rates) == (arms[1].seeds, arms[1].rates)
        assert arm.run_spec(seed=4, rate=1.0).train == arms[1].run_spec(seed=4, rate=1.0).train
        assert arm.settings.adapter.rank == 5
    assert len({arm.layers for arm in arms}) == len(arms)
    assert [str(arm.policy) for arm in arms[-2:]] == ["last:3", "every:3"]


def test_expected_controls_have_the_names_of_those_to_come():
    spec = study("super")
    (arm,) = arms_of(spec, N_LAYERS)
    arms, controls = add_controls(found(spec, super=(0, 5)), spec, N_LAYERS)
    assert [a.name for a in expected_controls(arm, spec)] == list(controls["super"])
    assert len(arms) == 5


def test_no_controls():
    spec = study("super", controls=False)
    arms, controls = add_controls(found(spec, super=(0, 5)), spec, N_LAYERS)
    assert ([arm.name for arm in arms], controls) == (["super"], {})
    assert expected_controls(arms[0], spec) == []


def test_an_arm_without_layers_has_no_controls():
    spec = study("super")
    arms, controls = add_controls(arms_of(spec, N_LAYERS), spec, N_LAYERS)
    assert ([arm.name for arm in arms], controls) == (["super"], {})


def test_an_arm_that_is_there_serves_as_a_control():
    spec = study("super", "last:2", {"name": "auto:1", "seeds": [0, 4]})
    layers = {"super": (1, 3), "auto-1": (4, 9)}
    arms, controls = add_controls(found(spec, **layers), spec, N_LAYERS)
    assert controls["super"] == {
        "super-random-1": "super-random-1",
        "super-random-2": "super-random-2",
        "super-last": "last-2",
        "super-every": "super-every",
    }
    # the same number of layers: the controls of the one are those of the other
    assert list(controls["auto-1"].values()) == list(controls["super"].values())
    assert [a.name for a in arms] == [
        *("super", "super-random-1", "super-random-2", "super-every", "last-2", "auto-1")
    ]


def test_an_arm_of_other_settings_does_not_serve():
    spec = study("super", {"name": "top", "layers": "last:2", "rank": 9})
    _, controls = add_controls(found(spec, super=(1, 3)), spec, N_LAYERS)
    assert controls["super"]["super-last"] == "super-last"


def test_an_arm_may_be_its_own_control():
    spec = study("super")
    arms, controls = add_controls(found(spec, super=(10, 11)), spec, N_LAYERS)
    assert controls["super"]["super-last"] == "super"
    assert (10, 11) not in [arm.layers for arm in arms[1:]]


def test_where_all_layers_are_found_there_is_nothing_to_draw():
    spec = study("super")
    arms, controls = add_controls(found(spec, super=tuple(range(12))), spec, N_LAYERS)
    assert (len(arms), set(controls["super"].values())) == (1, {"super"})


ALL = tuple(range(N_LAYERS))


@pytest.mark.parametrize(
    ("arms", "layers", "settings", "same"),
    [
        (["lora", "super"], {"super": ALL}, {}, {"super": "lora"}),
        (["super", "lora"], {"super": ALL}, {}, {"super": "lora"}),  # named layers come first
        (["super", "auto:0.5"], {"super": (3,), "auto-0.5": (3,)}, {}, {"auto-0.5": "super"}),
        (["lora", "all"], {}, {}, {}),  # both were asked for
        (["lora", "super"], {"super": (3,)}, {}, {}),
        (["lora", {"name": "s", "layers": "super", "rank": 9}], {"s": ALL}, {}, {}),
        (["lora", {"name": "s", "layers": "super", "rates": [0.1]}], {"s": ALL}, {}, {}),
        (["lora", {"name": "s", "layers": "super", "seeds": [0, 1]}], {"s": ALL}, {}, {}),
        (["lora", {"name": "s", "layers": "super", "seeds": [4]}], {"s": ALL}, {}, {"s": "lora"}),
        (["lora", "super"], {"super": ALL}, {"beam": {"arms": ["super"]}}, {}),
        (["lora", "super"], {"super": ALL}, {"beam": {"arms": ["lora"]}}, {"super": "lora"}),
    ],
)
def test_an_arm_that_found_the_layers_of_another_has_its_runs(arms, layers, settings, same):
    spec = study(*arms, **settings)
    assert same_runs(found(spec, **layers), spec) == same


def test_controls_may_have_fewer_seeds():
    """An arm with more seeds serves as a control with fewer, and not the other way round."""
    some, more = {"control_seeds": [4]}, {"name": "top", "layers": "last:2"}
    for seeds, server in (([4, 9], "top"), ([9], "super-last")):
        spec = study({"name": "super", **some}, {**more, "seeds": seeds})
        arms, controls = add_controls(found(spec, super=(1, 3)), spec, N_LAYERS)
        assert arms[0].seeds == (0, 4)
        assert {arm.seeds for arm in arms if arm.control_of} == {(4,)}
        assert controls["super"]["super-last"] == server
        assert {arm.seeds for arm in expected_controls(arms[0], spec)} == {(4,)}


def test_only_some_arms():
    spec = study("lora", "super")
    arms = arms_of(spec, N_LAYERS)
    everything = select_arms(arms, spec, [])
    assert everything[:3] == ["lora", "super", "super-random-1"]
    assert select_arms(arms, spec, ["super-last"]) == ["super-last"]
    with pytest.raises(UserError, match=r"--only dora: the study has lora, super, super-random-1"):
        select_arms(arms, spec, ["lora", "dora"])
