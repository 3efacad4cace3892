"""Charts as numbers: where points, ticks and marks lie."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swlora.web.pages.charts import Series, finite, line_chart, thinned

LABELS = ("x", "y")


def places(path: str) -> list[tuple[float, float]]:
    """The points of a path, in percent."""
    pairs = [pair.split() for pair in path.removeprefix("M").split("L")]
    return [(float(x) / 10, float(y) / 10) for x, y in pairs]


def test_points_lie_where_their_values_say():
    chart = line_chart("t", "d", LABELS, [Series("a", [(0, 10), (5, 20), (10, 30)], dots=True)])
    line = chart.lines[0]
    assert [x for x, _ in places(line.path)] == [0, 50, 100]
    bottom, middle, top = (y for _, y in places(line.path))
    assert bottom > middle == 50 > top
    assert bottom + top == pytest.approx(100)
    assert line.dots == places(line.path)
    ticks = {label: at for at, label in chart.y_ticks}
    assert ticks["20"] == 50
    assert [label for _, label in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    points = [(0, 1), (1, 10), (2, 100), (3, 1000), (4, 0), (5, -3), (6, math.inf)]
    chart = line_chart("t", "d", LABELS, [Series("a", points)], log_y=True)
    ys = [y for _, y in places(chart.lines[0].path)]
    assert len(ys) == 4  # what has no logarithm is left out
    steps = [a - b for a, b in pairwise(ys)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.02)
    assert [label for _, label in chart.y_ticks] == ["1", "10", "100", "1,000"]


def test_what_lies_outside_of_a_range_is_drawn_at_its_edge():
    series = [Series("a", [(0, 100.0), (1, 2.0), (2, 1.0)])]
    chart = line_chart("t", "d", LABELS, series, y_range=(1.0, 2.0))
    ys = [y for _, y in places(chart.lines[0].path)]
    assert ys[0] == 0 < ys[1] < ys[2] < 100


def test_nothing_to_draw_is_no_chart():
    assert line_chart("t", "d", LABELS, []) is None
    assert line_chart("t", "d", LABELS, [Series("a", [(0, math.nan)])]) is None
    assert line_chart("t", "d", LABELS, [Series("a", [(0, 0)])], log_y=True) is None


def test_equal_names_stand_once_in_the_legend():
    series = [Series("other", [(0, 1), (1, 2)], "faint") for _ in range(3)]
    chart = line_chart("t", "d", LABELS, [*series, Series("mine", [(0, 1)])])
    assert chart.legend == [("faint", "other"), ("main", "mine")]
    assert chart.lines[3].dots  # one point alone would be no line


floats = st.floats(-1e100, 1e100)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=20), st.booleans())
def test_everything_lies_inside(points, log_y):
    chart = line_chart("t", "d", LABELS, [Series("a", points, dots=True)], log_y=log_y)
    if chart is None:
        assert log_y
        return
    inside = [*places(chart.lines[0].path), *chart.lines[0].dots]
    inside += [(at, at) for at, _ in [*chart.x_ticks, *chart.y_ticks]]
    assert all(0 <= value <= 100 for pair in inside for value in pair)
    assert len(chart.x_ticks) <= 8 and len(chart.y_ticks) <= 12


def test_many_points_become_means_of_equal_shares():
    points = [(float(k), float(k % 2)) for k in range(6001)]
    few = thinned(points, 301)
    assert len(few) == 301
    assert few[-1] == points[-1]
    assert all(y == pytest.approx(0.5) for _, y in few[:-1])
    assert thinned(points[:9], 9) == points[:9]


@pytest.mark.parametrize(
    "value", [None, True, "1", [], {}, math.nan, math.inf, -math.inf, 10**400, 2**1024]
)
def test_what_is_no_finite_number_is_none(value):
    assert finite(value) is None


def test_numbers_are_floats():
    assert (finite(3), finite(-0.5)) == (3.0, -0.5)
