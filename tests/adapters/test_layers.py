"""Layer policies: a table of answers, a table of mistakes, and what holds for every size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swlora.adapters.layers import (
    Identified,
    needs_identification,
    resolve_layers,
    time_budget,
)
from swlora.errors import UserError


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
    assert resolve_layers(policy, 7) == expected


def test_super_takes_what_was_verified():
    found = Identified(super_layers=[5, 2, 5], removal_layers=[6, 5])
    assert needs_identification("super") and needs_identification("super+removal")
    assert resolve_layers("super", 7, found) == [2, 5]
    assert resolve_layers("super+removal", 7, found) == [2, 5, 6]
    assert not any(map(needs_identification, ("all", "last:2", "2,5", "random:2:0", "every:2")))


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
        resolve_layers(policy, 7)
    assert "not understood" not in said or "random:K:SEED" in str(refused.value)


def test_super_without_super_weights():
    with pytest.raises(UserError, match="no super weight was verified"):
        resolve_layers("super", 7, Identified([], [6]))
    with pytest.raises(UserError, match="needs the layers"):
        resolve_layers("super", 7)


@given(st.data())
def test_k_layers_of_any_model(data):
    n_layers = data.draw(st.integers(1, 80))
    k = data.draw(st.integers(1, n_layers))
    seed = data.draw(st.integers(0, 99))
    for policy in (f"last:{k}", f"first:{k}", f"every:{k}", f"random:{k}:{seed}"):
        layers = resolve_layers(policy, n_layers)
        assert len(layers) == len(set(layers)) == k
        assert layers == sorted(layers)
        assert 0 <= layers[0] <= layers[-1] < n_layers
    every = resolve_layers(f"every:{k}", n_layers)
    assert every[-1] == n_layers - 1
    gaps = {b - a for a, b in zip([-1, *every], every, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_random_layers_depend_on_the_seed_alone():
    draws = [tuple(resolve_layers(f"random:3:{seed}", 30)) for seed in range(20)]
    assert draws == [tuple(resolve_layers(f"random:3:{seed}", 30)) for seed in range(20)]
    assert len(set(draws)) > 10


def test_a_time_budget():
    assert time_budget("auto:0.5") == 0.5
    assert time_budget("auto:1") == 1.0
    assert time_budget("last:4") is None


@pytest.mark.parametrize("policy", ["auto", "auto:", "auto:0", "auto:1.1", "auto:nan", "auto:x"])
def test_a_budget_that_is_none(policy):
    with pytest.raises(UserError, match=r"not understood: auto:0\.5 takes"):
        time_budget(policy)
