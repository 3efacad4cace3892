"""Layer policies as they are read: without a model, and with the nearest one named."""

import pytest

from swlora.config import load_spec
from swlora.errors import UserError
from swlora.layer_policy import LayerPolicy, parse_policy


@pytest.mark.parametrize(
    ("text", "kind", "numbers"),
    [
        ("all", "all", ()),
        ("super+removal", "super+removal", ()),
        ("auto:.5", "auto", (0.5,)),
        ("auto:1", "auto", (1.0,)),
        ("last:4", "last", (4,)),
        ("random:4:0", "random", (4, 0)),
        ("11,2", "list", (11, 2)),
    ],
)
def test_what_is_read(text, kind, numbers):
    assert parse_policy(text) == LayerPolicy(text, kind, numbers)


def test_spaces_say_nothing():
    assert parse_policy(" 2, 11 ") == parse_policy("2,11")
    assert load_spec(None, {"adapter.layers": "2, 11"}).adapter.layers == "2,11"


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
