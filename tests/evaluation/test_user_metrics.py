"""A metric of one's own: loaded when it is named, its mistakes are one line."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from swlora.errors import UserError
from swlora.evaluation.user_metrics import UserMetric, load_metric

FILE = """
import statistics

def length(predictions, references):
    return statistics.mean(map(len, predictions))

def several(predictions, references):
    return {"n": len(predictions), "refs": sum(map(len, references))}

constant = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FILE)
    return str(tmp_path / "mine.py")


def test_a_number_has_the_name_of_its_function(mine: str) -> None:
    assert load_metric(f"{mine}:length")(["ab", "abcd"], [["a"], ["b"]]) == {"length": 3.0}


def test_numbers_by_name(mine: str) -> None:
    found = load_metric(f"{mine}:several")(["a", "b"], [["a"], ["b", "c"]])
    assert found == {"n": 2.0, "refs": 3.0}
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.txt:length", "is not FILE.py:function"),
        ("{mine}", "is not FILE.py:function"),
        ("{mine}:", "is not FILE.py:function"),
        ("{mine}:a b", "is not FILE.py:function"),
        ("{mine}:gone", "has no function 'gone'"),
        ("{mine}:constant", "has no function 'constant'"),
        ("gone.py:length", "there is no file gone.py"),
    ],
)
def test_what_cannot_be_loaded(name: str, said: str, mine: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        load_metric(name.format(mine=mine))


@pytest.mark.parametrize(
    "text", ["def f(:", "import no_such_module_at_all", "1 / 0", "raise SystemExit(3)"]
)
def test_a_file_that_fails(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_metric(f"{tmp_path / 'bad.py'}:f")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned None"),
        ("good", "returned 'good'"),
        (float("nan"), "returned nan"),
        (10**400, "returned 1000"),
        ({"a": [1]}, r"returned \[1\]"),
        ({1: 1.0}, "returned 1.0"),
        ({}, "returned no number"),
    ],
)
def test_what_is_no_number(returned: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        UserMetric("x.py:f", lambda *_: returned)(["a"], [["a"]])


def test_numbers_of_numpy_are_numbers_and_errors_are_said() -> None:
    assert UserMetric("x.py:f", lambda *_: np.float32(0.5))(["a"], [["a"]]) == {"f": 0.5}
    with pytest.raises(UserError, match=r"x\.py:f failed: ZeroDivisionError: division by zero"):
        UserMetric("x.py:f", lambda *_: 1 / 0)(["a"], [["a"]])


def test_an_exit_is_said_as_a_failure() -> None:
    with pytest.raises(UserError, match="failed: SystemExit: 3"):
        UserMetric("x.py:f", lambda *_: sys.exit(3))(["a"], [["a"]])


def test_a_file_may_have_dataclasses_with_postponed_annotations(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Score:\n    value: float\n\n"
        "def f(predictions, references):\n    return Score(0.5).value\n"
    )
    assert load_metric(f"{tmp_path / 'own.py'}:f")(["a"], [["a"]]) == {"f": 0.5}
