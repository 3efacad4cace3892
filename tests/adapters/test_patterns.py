"""Which expressions of an adapter's configuration are matched, and that they match as in PEFT."""

import time

import pytest
from peft.utils.other import get_pattern_key

from swlora.adapters.patterns import check_patterns, is_plain, matching_keys
from swlora.errors import UserError

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 11)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
PLAIN = [
    "q_proj",
    "1.mlp.down_proj",
    "^model.layers.1.self_attn.q_proj",
    r"^model\.layers\.11\.mlp\.down_proj$",
    ".*down_proj",
    r"layers.\d+.mlp.down_proj",
    r"layers.[0-9]+.self_attn.(q|v)_proj",
    ".*layers.*.self_attn.*",
    "nothing",
]
OTHERS = ["(a+)+x", "(q|v)*_proj", "(.*)+", "a{3}", "[a-z]+", "q?", ".*.*.*.*x", "(?i)q", "a++"]
OTHERS.append("x" * 501)


@pytest.mark.parametrize("key", PLAIN)
@pytest.mark.parametrize("name", NAMES)
def test_plain_keys_match_as_in_peft(key, name):
    assert is_plain(key)
    values = {"other": 1, key: 2}
    assert (matching_keys(values, name) or [name])[0] == get_pattern_key(list(values), name)


@pytest.mark.parametrize("key", OTHERS)
def test_other_expressions_are_refused_unmatched(key):
    with pytest.raises(UserError, match=r"its alpha_pattern has the expression"):
        check_patterns({"alpha_pattern": {"q_proj": 2, key: 3}})


def test_the_worst_that_is_taken_is_matched_at_once():
    name = "a." * 60 + "b"
    start_s = time.process_time()
    assert matching_keys({".*a.*a.*a": 1}, name) == []
    assert time.process_time() - start_s < 5


def test_patterns_are_mappings():
    check_patterns({"rank_pattern": {}, "alpha_pattern": None})
    with pytest.raises(UserError, match="is no mapping"):
        check_patterns({"rank_pattern": ["q_proj"]})
