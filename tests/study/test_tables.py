"""How numbers look, and that a table holds what it was given."""

import csv
import io

import pytest

from swlora.study.tables import csv_table, markdown_table, number, span


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (1.25, 1, False, "1.2"),
        (-1.25, 2, False, "−1.25"),
        (0.5, 1, True, "+0.5"),
        (-0.04, 1, True, "−0.0"),
        (None, 3, True, "n/a"),
    ],
)
def test_numbers(value: float | None, digits: int, sign: bool, text: str) -> None:
    assert number(value, digits, sign=sign) == text


def test_intervals() -> None:
    assert span((-1.0, 2.0), 2, sign=True) == "[−1.00, +2.00]"


def test_a_cell_cannot_break_the_table() -> None:
    table = markdown_table([("a", lambda r: r["x"]), ("b", lambda _: "2")], [{"x": "p | q"}])
    assert table.splitlines() == ["| a | b |", "|---|---:|", "| p \\| q | 2 |"]


def test_csv_holds_every_single_value_under_its_name() -> None:
    full = {
        "name": 'a "b", c',
        "seeds": [0, 2],
        "bleu": 61.25,
        "spread": {"bleu": {"mean": 61.25, "sd": None, "min": 61.0}},
        "curve": {"nll": [1.0]},
        "runs": [{"seed": 0}],
    }
    arms = [full, {"name": "failed", "seeds": [], "status": "failed"}]
    rows = list(csv.DictReader(io.StringIO(csv_table(arms)), strict=True))
    assert rows == [
        {
            "name": 'a "b", c',
            "seeds": "0 2",
            "bleu": "61.25",
            "spread.bleu.sd": "",
            "spread.bleu.min": "61.0",
            "status": "",
        },
        {
            "name": "failed",
            "seeds": "",
            "bleu": "",
            "spread.bleu.sd": "",
            "spread.bleu.min": "",
            "status": "failed",
        },
    ]
