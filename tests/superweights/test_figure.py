"""Figures: the lines are the result's numbers, and every format can be read on its page."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from swlora.errors import UserError
from swlora.models.anatomy import WeightAddress
from swlora.superweights.detect import ModuleScan, Spike
from swlora.superweights.effects import Dose
from swlora.superweights.figure import (
    FORMATS,
    check_target,
    draw_dose,
    draw_path,
    draw_scan,
    draw_sinks,
)
from swlora.superweights.findings import ActivationPath, DoseCurve

NAME = "layer 1 mlp.down_proj [out 7, in 9]"


def spike(value: float) -> Spike:
    return Spike(value, token=0, channel=7)


MODEL = "a model of 3 layers"
MODULES = [
    ModuleScan(layer, name, input=spike(-2.0 - layer), output=spike(10.0**layer))
    for layer in range(3)
    for name in ("self_attn.o_proj", "mlp.down_proj")
]
ADDRESS = WeightAddress(1, "mlp.down_proj", 7, 9)
PATH = ActivationPath(
    NAME,
    ADDRESS,
    token=4,
    intact=[1.0, -900.0, 3.0],
    ablated=[1.0, -2.0, 0.0],
    others=[2.0, 5.0, 6.0],
)
CURVE = DoseCurve(
    NAME,
    ADDRESS,
    tuple(
        Dose(scale, ppl, ppl / 5)
        for scale, ppl in ((0.0, 1e9), (0.5, 80.0), (1.0, 5.0), (2.0, 5.5))
    ),
)


def scan_drawn(target: Path) -> None:
    draw_scan(MODEL, MODULES, [1], target)


def path_drawn(target: Path) -> None:
    draw_path(PATH, target)


def dose_drawn(target: Path) -> None:
    draw_dose(CURVE, target)


SINKS = {"the model as it is": [0.1, 0.6, 0.7], f"{NAME} at zero": [0.1, 0.6, 0.2]}


def sinks_drawn(target: Path) -> None:
    draw_sinks(MODEL, SINKS, target)


DRAWINGS = [scan_drawn, path_drawn, dose_drawn, sinks_drawn]
each_drawing = pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function (draw, what) -> the matplotlib figure that would be saved."""
    seen: list[Figure] = []

    def keep(self: Figure, target: Path, **_: Any) -> None:
        seen.append(self)
        target.write_bytes(b"x")

    def figure(draw, *what) -> Figure:
        draw(*what, tmp_path / "a.png")
        return seen[-1]

    monkeypatch.setattr(Figure, "savefig", keep)
    return figure


def lines(panel: Any) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for line in panel.get_lines():
        found[line.get_label()] = ([*map(float, line.get_xdata())], [*map(float, line.get_ydata())])
    return found


def test_the_scan_is_one_line_a_projection(drawn):
    figure = drawn(draw_scan, MODEL, MODULES, [1])
    assert figure.get_suptitle().startswith("Largest activations in a model of 3 layers")
    for panel, values in zip(figure.axes, ([2, 3, 4], [1, 10, 100]), strict=True):
        shown = lines(panel)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            assert shown[name] == ([0, 1, 2], values)
        marked = [x for label, (x, _) in shown.items() if label.startswith("_")]
        assert marked == [[1, 1]]
        assert panel.get_yscale() == "log"
        assert (panel.get_xlabel(), panel.get_title().split()[0]) == (
            "layer",
            panel.get_ylabel().split("|")[1],
        )


def test_without_a_super_weight_nothing_is_marked(drawn):
    figure = drawn(draw_scan, MODEL, MODULES, [])
    assert all(len(panel.get_lines()) == 2 for panel in figure.axes)
    assert "super weight" not in figure.get_suptitle()


def test_more_projections_than_colors_are_all_drawn(drawn):
    modules = [replace(MODULES[0], module=f"m{k}") for k in range(20)]
    figure = drawn(draw_scan, MODEL, modules, [])
    assert [len(panel.get_lines()) for panel in figure.axes] == [20, 20]


def test_the_path_before_and_after(drawn):
    figure = drawn(draw_path, PATH)
    assert figure.get_suptitle().endswith(f"{NAME}, token 4")
    (panel,) = figure.axes
    assert list(lines(panel).values()) == [
        ([0, 1, 2], [1, 900, 3]),
        ([0, 1, 2], [1, 2, 0]),
        ([0, 1, 2], [2, 5, 6]),
    ]
    assert "channel 7" in panel.get_ylabel()
    assert len(panel.get_legend().get_texts()) == 3


def test_the_dose_curve(drawn):
    figure = drawn(draw_dose, CURVE)
    assert NAME in figure.get_suptitle()
    curve, mark = lines(figure.axes[0]).values()
    assert curve == ([0, 0.5, 1, 2], [1e9, 80, 5, 5.5])
    assert mark[0] == [1, 1]
    assert "perplexity" in figure.axes[0].get_ylabel()


def test_sinks_are_a_line_for_each_model(drawn):
    (panel,) = drawn(draw_sinks, MODEL, SINKS).axes
    assert lines(panel) == {name: ([0, 1, 2], masses) for name, masses in SINKS.items()}
    assert panel.get_ylim() == (0, 1)
    assert len({line.get_color() for line in panel.get_lines()}) == 2


@each_drawing
@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.PDF", b"%PDF")]
)
def test_every_format(draw, name, start, tmp_path):
    draw(tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(start)


@each_drawing
def test_svg_has_no_background_and_no_text_that_vanishes(draw, tmp_path):
    """Neither black nor white: what is drawn must be seen on a light and on a dark page."""
    draw(tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    colors = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
    assert "#767676" in colors
    for color in colors:
        assert contrast(color, "#ffffff") > 3, color
        assert contrast(color, "#000000") > 3, color


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two colours."""

    def luminance(color: str) -> float:
        parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_png_has_a_white_background(tmp_path):
    from matplotlib.image import imread

    draw_dose(CURVE, tmp_path / "a.png")
    assert imread(tmp_path / "a.png")[0, 0].tolist() == [1, 1, 1, 1]


@each_drawing
@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_result_gives_the_same_bytes(draw, suffix, tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "png", "a.png.txt", "a"])
def test_other_endings_are_refused(name):
    with pytest.raises(UserError, match="must end in"):
        check_target(Path(name))
    for suffix in FORMATS:
        check_target(Path(f"{name}{suffix.upper()}"))


def test_a_figure_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file and no folder; choose another --figure"):
        check_target(tmp_path / "file" / "a.png")
