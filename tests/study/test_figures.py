"""The pictures: labels apart, colours that both backgrounds show, bars where the numbers are."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from swlora.study.collect import collect
from swlora.study.compared import Compared
from swlora.study.figures import GREY, STYLES, draw_curves, draw_pareto
from swlora.study.labels import place
from swlora.study.results import summarise

LIGHT, DARK = (255, 255, 255), (13, 17, 23)
PANEL = np.array([0.0, 0.0, 600.0, 400.0])
NO_BOXES = np.empty((0, 4))


@pytest.fixture
def results(study: Any) -> Compared:
    """A baseline, layers that were found, two controls and another method, five points each."""
    kinds = {"lora": None, "super": None, "super-last": "super", "super-every": "super"}
    for k, (name, control_of) in enumerate(kinds.items()):
        study.arm(name, "super" if name == "super" else "all", control_of=control_of)
        for seed in (0, 1):
            quality = 0.8 - 0.01 * k + 0.004 * seed
            study.run(name, seed, quality=quality, nll=1.2 + 0.01 * k, step_s=2.0 - 0.1 * k + seed)
    study.arm("dora", "all", (0,))
    study.run("dora", 0, quality=0.8, nll=1.2, step_s=3.0, held_out=False)
    return summarise(collect(study.save()))


def area_in_common(one: np.ndarray, other: np.ndarray) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    return float(sides.clip(min=0).prod())


@pytest.mark.parametrize("n", [1, 5, 14])
def test_labels_of_a_crowd_do_not_overlap(n: int) -> None:
    """Points so close that all labels would lie over each other, some at the panel's edge."""
    rng = np.random.default_rng(n)
    points = rng.normal((560, 200), (12, 25), size=(n, 2)).clip(max=598)
    markers = np.concatenate([points - 6, points + 6], axis=1)
    boxes = place(points, [(80.0, 11.0)] * n, markers, NO_BOXES, PANEL)
    for i, box in enumerate(boxes):
        assert area_in_common(box, PANEL) == pytest.approx(80 * 11)
        covered = [area_in_common(box, other) for other in (*boxes[:i], *markers)]
        assert sum(covered) == pytest.approx(0)


def test_a_label_stays_near_and_off_a_line_where_it_can() -> None:
    point = [(300.0, 200.0)]
    (free,) = place(point, [(50.0, 10.0)], NO_BOXES, NO_BOXES, PANEL)
    assert free.tolist() == [309, 195, 359, 205]
    x = np.arange(302.0, 600.0, 4.0)
    line = np.stack([x - 2, np.full_like(x, 198), x + 2, np.full_like(x, 202)], axis=1)
    (beside,) = place(point, [(50.0, 10.0)], NO_BOXES, line, PANEL)
    assert sum(area_in_common(beside, piece) for piece in line) == 0
    assert abs(beside[:2] - (300, 200)).max() < 70


def luminance(rgb: tuple[int, ...]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [c / 255 for c in rgb]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", sorted({GREY, *(style.color for style in STYLES.values())}))
@pytest.mark.parametrize("background", [LIGHT, DARK])
def test_colours_stand_out_from_light_and_dark(color: str, background: tuple[int, ...]) -> None:
    rgb = tuple(int(color[k : k + 2], 16) for k in (1, 3, 5))
    low, high = sorted((luminance(rgb), luminance(background)))
    assert (high + 0.05) / (low + 0.05) > 3


@pytest.mark.parametrize("draw", [draw_pareto, draw_curves])
def test_files_are_pictures_and_the_same_each_time(
    draw: Any, results: Compared, tmp_path: Path
) -> None:
    from matplotlib.image import imread

    for ending in ("png", "svg"):
        draw(results, tmp_path / f"one.{ending}")
        draw(results, tmp_path / f"two.{ending}")
        same = [(tmp_path / f"{name}.{ending}").read_bytes() for name in ("one", "two")]
        assert same[0] == same[1]
    image = imread(tmp_path / "one.png")
    assert image.shape[2] == 4
    assert (image[..., 3] == 0).mean() > 0.7, "the background is transparent"
    assert (image[..., 3] == 1).any()
    root = ElementTree.parse(tmp_path / "one.svg").getroot()
    assert root.tag.endswith("svg")


def test_bars_are_the_paired_intervals_at_the_baseline(
    results: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    bars: list[tuple[float, float, float, float]] = []
    errorbar = Axes.errorbar

    def recording(self: Axes, x: float, y: float, **style: Any) -> Any:
        (left,), (right,) = style["xerr"]
        (below,), (above,) = style["yerr"]
        bars.append((x - left, x + right, y - below, y + above))
        return errorbar(self, x, y, **style)

    monkeypatch.setattr(Axes, "errorbar", recording)
    draw_pareto(results, tmp_path / "pareto.png")
    arms = results.finished
    base = next(arm for arm in arms if arm.is_baseline)
    expected = []
    for score in ("bleu", "nll"):
        for arm in arms:
            spread = arm.time_spread.total_s
            low = y = high = arm.scores.measured(score)
            if arm is not base:
                found, of_base = arm.against_baseline[score], base.scores.measured(score)
                low, high = (of_base + bound for bound in found.interval)
                y = of_base + found.difference
            expected.append((spread.min, spread.max, min(low, y), max(high, y)))
    assert bars == [pytest.approx(bar) for bar in expected]
    bars.clear()
    for arm in arms:  # as where documents stand beside the prompts
        arm.intervals.pop("nll")
        arm.against_baseline.pop("nll", None)
    draw_pareto(results, tmp_path / "pareto.png")
    assert bars[: len(arms)] == [pytest.approx(bar) for bar in expected[: len(arms)]]
    losses = [arm.scores.measured("nll") for arm in arms]
    assert [bar[2:] for bar in bars[len(arms) :]] == [(nll, nll) for nll in losses]


def test_bands_and_curves_lie_where_the_numbers_are(
    results: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    bands: list[tuple[float, float]] = []
    panels: list[Axes] = []
    lines: list[tuple[Any, Any]] = []
    axhspan, plot = Axes.axhspan, Axes.plot

    def noted_band(self: Axes, low: float, high: float, **style: Any) -> Any:
        bands.append((low, high))
        panels.append(self)
        return axhspan(self, low, high, **style)

    def noted_line(self: Axes, x: Any, y: Any, **style: Any) -> Any:
        lines.append((x, y))
        return plot(self, x, y, **style)

    monkeypatch.setattr(Axes, "axhspan", noted_band)
    draw_pareto(results, tmp_path / "pareto.png")
    arms, margin = results.finished, results.margin
    base = next(arm for arm in arms if arm.is_baseline)
    bleu, nll = (base.scores.measured(score) for score in ("bleu", "nll"))
    assert bands == [(bleu - margin["bleu"], bleu), (nll, nll + margin["nll"])]
    assert [panel.yaxis_inverted() for panel in panels] == [False, True], "better is up"
    monkeypatch.setattr(Axes, "plot", noted_line)
    draw_curves(results, tmp_path / "curves.png")
    # Behind them come those that lead from a label to its point.
    assert lines[: len(arms)] == [(arm.curve.seconds, arm.curve.nll) for arm in arms]


def test_without_a_baseline_there_is_no_margin(results: Compared, tmp_path: Path) -> None:
    others = [replace(arm, against_baseline={}) for arm in results.finished if not arm.is_baseline]
    draw_pareto(replace(results, arms=others), tmp_path / "pareto.svg")
    draw_curves(replace(results, arms=others, target_nll=None), tmp_path / "curves.svg")
    with_margin = (tmp_path / "pareto.svg").read_bytes().count(STYLES["baseline"].color.encode())
    assert with_margin == 0
