"""Layer policies: a table of answers, a table of mistakes, and what holds for every size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swlora.config import AdapterSpec, dump_yaml, load_spec
from swlora.errors import NoSuperWeightError, UserError
from swlora.layer_policy import (
    EN_DASH,
    LayerPolicy,
    VerifiedLayers,
    layer_ranges,
    parse_policy,
    policy_or_none,
)


def resolve(text, n_layers, verified=None):
    return parse_policy(text).resolve(n_layers, verified)


@pytest.mark.parametrize(
    ("text", "kind", "numbers", "budget"),
    [
        ("all", "all", (), None),
        ("super+removal", "super+removal", (), None),
        ("auto:.5", "auto", (), 0.5),
        ("auto:1", "auto", (), 1.0),
        ("last:4", "last", (4,), None),
        ("random:4:0", "random", (4, 0), None),
        ("11,2", "list", (11, 2), None),
    ],
)
def test_what_is_read(text, kind, numbers, budget):
    assert parse_policy(text) == LayerPolicy(text, kind, numbers, budget)
    assert policy_or_none(text) == parse_policy(text)
    spec = load_spec(None, {"adapter.layers": text})
    assert spec.adapter.layers == parse_policy(text)
    assert f"layers: {text}\n" in dump_yaml(spec).replace("'", "")  # as it was written
    assert AdapterSpec.model_validate(spec.adapter.model_dump()) == spec.adapter


def test_spaces_say_nothing():
    assert parse_policy(" 2, 11 ") == parse_policy("2,11")
    assert load_spec(None, {"adapter.layers": "2, 11"}).adapter.layers == parse_policy("2,11")


@pytest.mark.parametrize(
    ("text", "meant"),
    [("lats:4", "last:4"), ("al", "all"), ("evry:2", "every:2"), ("supr", "super")],
)
def test_the_nearest_policy_is_named(text, meant):
    said = rf"'{text}' is not understood \(do you mean {meant}\?\); use all, super, "
    with pytest.raises(UserError, match=said):
        parse_policy(text)
    with pytest.raises(UserError, match=f"^--layers: {said}"):
        load_spec(None, {"adapter.layers": text})


def test_a_policy_that_is_like_no_other_gets_no_guess():
    with pytest.raises(UserError, match="'7x' is not understood; use "):
        parse_policy("7x")
    assert policy_or_none("7x") is None


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("last:1", [6]),
        ("last:3", [4, 5, 6]),
        ("last:7", [0, 1, 2, 3, 4, 5, 6]),
        ("first:2", [0, 1]),
        ("every:1", [6]),
        ("every:2", [3, 6]),
        ("every:3", [1, 4, 6]),
        ("every:7", [0, 1, 2, 3, 4, 5, 6]),
        ("0", [0]),
        ("6", [6]),
        ("5,2", [2, 5]),
        ("2, 5 ,2", [2, 5]),
    ],
)
def test_policies(policy, expected):
    assert resolve(policy, 7) == expected


def test_super_takes_what_was_verified():
    found = VerifiedLayers(super_layers=[5, 2, 5], removal_layers=[6, 5])
    assert resolve("super", 7, found) == [2, 5]
    assert resolve("super+removal", 7, found) == [2, 5, 6]


@pytest.mark.parametrize(
    ("text", "identification", "search"),
    [
        ("super", True, True),
        ("super+removal", True, True),
        ("auto:0.5", False, True),
        *((text, False, False) for text in ("all", "last:2", "2,5", "random:2:0", "every:2")),
    ],
)
def test_what_must_be_found_by_running_the_model(text, identification, search):
    policy = parse_policy(text)
    assert (policy.needs_identification, policy.needs_search) == (identification, search)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", True), ("first:1", True), ("3,0", True), ("1,10", False), ("last:4", False)],
)
def test_whether_the_first_layer_is_there_in_whatever_model(text, expected):
    assert parse_policy(text).has_first_layer == expected


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("7", "layer 7 does not exist; this model has layers 0 to 6"),
        ("2,70", "layer 70 does not exist"),
        ("last:0", "K must be 1 or more"),
        ("last:8", "K must be from 1 to 7"),
        ("every:8", "K must be from 1 to 7"),
        ("random:8:0", "K must be from 1 to 7"),
        ("first", "not understood"),
        ("last:", "not understood"),
        ("last:x", "not understood"),
        ("last:-1", "not understood"),
        ("last:²", "not understood"),
        ("last:1:1", "not understood"),
        ("every:2:1", "not understood"),
        ("random:2", "not understood"),
        ("random:2:1:1", "not understood"),
        ("middle:2", "not understood"),
        ("-1", "not understood"),
        ("1.5", "not understood"),
        ("2,", "not understood"),
        ("2;5", "not understood"),
        ("ALL", "not understood"),
        (" ", "not understood"),
        ("", "not understood"),
        ("super:2", "not understood"),
    ],
)
def test_mistakes(policy, said):
    with pytest.raises(UserError, match=said) as refused:
        resolve(policy, 7)
    assert "not understood" not in said or "random:K:SEED" in str(refused.value)


def test_super_without_super_weights():
    with pytest.raises(NoSuperWeightError, match="no super weight was verified"):
        resolve("super", 7, VerifiedLayers([], [6]))
    with pytest.raises(UserError, match="needs the layers"):
        resolve("super", 7)


@given(st.data())
def test_k_layers_of_any_model(data):
    n_layers = data.draw(st.integers(1, 80))
    k = data.draw(st.integers(1, n_layers))
    seed = data.draw(st.integers(0, 99))
    for policy in (f"last:{k}", f"first:{k}", f"every:{k}", f"random:{k}:{seed}"):
        layers = resolve(policy, n_layers)
        assert len(layers) == len(set(layers)) == k
        assert layers == sorted(layers)
        assert 0 <= layers[0] <= layers[-1] < n_layers
    every = resolve(f"every:{k}", n_layers)
    assert every[-1] == n_layers - 1
    gaps = {b - a for a, b in zip([-1, *every], every, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_random_layers_depend_on_the_seed_alone():
    draws = [tuple(resolve(f"random:3:{seed}", 30)) for seed in range(20)]
    assert draws == [tuple(resolve(f"random:3:{seed}", 30)) for seed in range(20)]
    assert len(set(draws)) > 10


def test_a_time_budget():
    assert parse_policy("auto:0.5").time_budget == 0.5
    assert parse_policy("auto:1").time_budget == 1.0
    assert parse_policy("last:4").time_budget is None
    with pytest.raises(UserError, match="--layers auto:1 needs a measurement"):
        resolve("auto:1", 7)


@pytest.mark.parametrize("policy", ["auto", "auto:", "auto:0", "auto:1.1", "auto:nan", "auto:x"])
def test_a_budget_that_is_none(policy):
    with pytest.raises(UserError, match=r"not understood: auto:0\.5 takes"):
        parse_policy(policy)


def test_ranges():
    assert layer_ranges([0, 1, 2, 5]) == "0-2, 5"
    assert layer_ranges([0, 1, 2, 5, 7, 8], EN_DASH) == "0–2, 5, 7–8"
    assert layer_ranges([], EN_DASH) == ""
