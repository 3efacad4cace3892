"""Line charts as numbers for an SVG that fits any width: what to draw, and where.

The lines lie in a square of 1000 by 1000 that is stretched over the plot; ticks, marks and dots are
given in percent of it, so that text and dots keep their size. A template draws them; colours and
dashes come from the style sheet by the names of the series.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from swlora.evaluation.loss_curve import Point

Tick = tuple[float, str]  # percent from the left or the top, label

SIDE = 1000.0
N_TICKS = 5
N_POINTS = 300
LARGEST = 1e100  # no measured number is larger
MARGIN = 0.04  # of the values' range, above and below


@dataclass(frozen=True)
class Series:
    """A line; `look` is one of main, second, third, faint."""

    name: str
    points: Sequence[Point]
    look: str = "main"
    dots: bool = False


@dataclass(frozen=True)
class Drawn:
    """A series where it lies in the plot."""

    look: str
    path: str
    dots: list[Point]


@dataclass(frozen=True)
class Chart:
    """A chart in words and in percent."""

    title: str
    description: str
    x_label: str
    y_label: str
    legend: list[tuple[str, str]]  # look, name
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Tick]
    lines: list[Drawn]


def line_chart(
    title: str,
    description: str,
    labels: tuple[str, str],
    series: Iterable[Series],
    *,
    log_y: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    y_range: tuple[float, float] | None = None,
) -> Chart | None:
    """Lay a chart out; None where there is nothing to draw.

    Points that are no numbers (or not positive, on a logarithmic axis) are left out; values outside
    of `y_range` are drawn at its edge. `marks` are vertical lines with a word.
    """
    kept = [_clean(one, log_y) for one in series]
    kept = [one for one in kept if one.points]
    if not kept:
        return None
    xs = [x for one in kept for x, _ in one.points]
    ys = [y for one in kept for _, y in one.points]
    x_axis = _Axis(min(xs), max(xs))
    low, high = y_range or (min(ys), max(ys))
    y_axis = _Axis(low, high, is_log=log_y, margin=MARGIN, is_up=True)
    names = dict.fromkeys((one.look, one.name) for one in kept)
    return Chart(
        title,
        description,
        *labels,
        legend=list(names),
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        marks=[(x_axis.percent(x), word) for x, word in marks],
        lines=[_drawn(one, x_axis, y_axis) for one in kept],
    )


def thinned(points: Sequence[Point], n: int = N_POINTS) -> list[Point]:
    """Return at most `n` points: means over equal shares of many, the last as it is."""
    if len(points) <= n:
        return list(points)
    edges = [round(k * (len(points) - 1) / (n - 1)) for k in range(n)]
    shares = [points[a:b] for a, b in pairwise(edges)]
    return [(_mean(x for x, _ in s), _mean(y for _, y in s)) for s in shares] + [points[-1]]


@dataclass(frozen=True)
class _Axis:
    """Maps values to percent; from the top for an axis that goes up."""

    low: float
    high: float
    is_log: bool = False
    margin: float = 0.0
    is_up: bool = False

    def _ends(self) -> tuple[float, float]:
        low, high = (self._scale(value) for value in (self.low, self.high))
        least = 1e-9 * max(abs(low), abs(high))  # floats nearer than that are one value
        room = self.margin * (high - low) if high - low > least else max(0.5, least)
        return low - room, high + room

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def percent(self, value: float) -> float:
        low, high = self._ends()
        share = min(1.0, max(0.0, (self._scale(value) - low) / (high - low)))
        return round(100 * (1 - share if self.is_up else share), 2)

    def ticks(self) -> list[Tick]:
        low, high = self._ends()
        values = _powers(low, high) if self.is_log else _round_numbers(low, high)
        return [(self.percent(value), _label(value)) for value in values]


def _powers(low: float, high: float) -> list[float]:
    """Return powers of ten between 10**low and 10**high, with 2 and 5 times them where few."""
    exponents = range(max(-307, math.floor(low)), min(308, math.ceil(high)) + 1)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    values = [factor * 10.0**e for e in exponents for factor in factors]
    inside = [value for value in values if low <= math.log10(value) <= high]
    return inside[:: math.ceil(len(inside) / (N_TICKS + 2)) or 1]


def _round_numbers(low: float, high: float) -> list[float]:
    raw = (high - low) / N_TICKS
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(f * unit for f in (1, 2, 5, 10) if f * unit >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _label(value: float) -> str:
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{round(value, 10):,g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _clean(series: Series, log_y: bool) -> Series:
    points = [
        (x, y)
        for x, y in series.points
        if abs(x) <= LARGEST and abs(y) <= LARGEST and (y > 0 or not log_y)
    ]
    return Series(series.name, thinned(points), series.look, series.dots)


def _drawn(series: Series, x_axis: _Axis, y_axis: _Axis) -> Drawn:
    places = [(x_axis.percent(x), y_axis.percent(y)) for x, y in series.points]
    scale = SIDE / 100
    path = "M" + "L".join(f"{x * scale:g} {y * scale:g}" for x, y in places)
    return Drawn(series.look, path, places if series.dots or len(places) == 1 else [])


def _mean(values: Iterable[float]) -> float:
    some = list(values)
    return sum(some) / len(some)


def finite(value: Any) -> float | None:
    """Return a number of a JSON file as a float; None for anything else, and beyond `LARGEST`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else None
