"""The two pictures of a study: total time against quality, and loss against seconds.

Colours are of equal, middle lightness, so that they stand out from white and from black (the
background is transparent), and differ for colour-blind eyes; markers and line styles say the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from swlora.files import atomic_path
from swlora.layer_policy import parse_policy
from swlora.study.compared import Compared, FinishedArm
from swlora.study.labels import label_points

GREY = "#7b7b7b"
BASELINE, FOUND, CONTROL, OTHER = "baseline", "layers found by a search", "control", "other arm"


class Style(NamedTuple):
    """How a kind of arm is drawn; `size` is the marker's, in points."""

    color: str
    marker: str
    size: float


# Okabe and Ito's colours, those with contrast to both backgrounds
STYLES = {
    BASELINE: Style("#d55e00", "*", 14.0),
    FOUND: Style("#0080c8", "o", 8.0),
    CONTROL: Style(GREY, "s", 6.0),
    OTHER: Style("#009e73", "^", 7.0),
}
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
PANELS = (("bleu", "BLEU", True), ("nll", "NLL, nats a token", False))


def draw_pareto(results: Compared, target: Path) -> None:
    """Draw seconds to the end against BLEU and against NLL; better is always up.

    The vertical bar of an arm is the 95 % interval of its paired difference from the baseline, put
    on the baseline's value: an arm is non-inferior where its bar stays above the band's lower edge,
    which is the margin. Horizontal bars reach from the fastest to the slowest seed. Without a
    baseline, vertical bars are the arms' own intervals. A loss that has no interval, as where
    documents stand beside the prompts, is a point alone.
    """
    arms = results.finished
    with figure_file(target, (11.5, 5.4)) as figure:
        panels = figure.subplots(1, 2)
        for panel, (score, label, larger_is_better) in zip(panels, PANELS, strict=True):
            baseline = next((arm for arm in arms if arm.is_baseline), None)
            for arm in arms:
                _draw_arm(panel, arm, score, baseline)
            if baseline:
                worse = -results.margin[score] if larger_is_better else results.margin[score]
                _draw_margin(panel, baseline, score, worse)
            _scale_seconds(panel, arms)
            if not larger_is_better:
                panel.invert_yaxis()
            panel.margins(x=0.12, y=0.12)
            dress_panel(panel, "seconds to the end, one-off costs included", label)
        _legend(figure, arms, markers=True)
        colors = [STYLES[_kind(arm)].color for arm in arms]
        for panel, (score, _, _) in zip(panels, PANELS, strict=True):
            points = [(arm.total_s, arm.scores.measured(score)) for arm in arms]
            label_points(panel, [arm.name for arm in arms], points, colors)


def draw_curves(results: Compared, target: Path) -> None:
    """Draw the held-out loss of every arm against seconds, mean over seeds.

    An arm without held-out points is drawn by its smoothed training loss, thin.
    """
    arms = results.finished
    kinds = [_kind(arm) for arm in arms]
    with figure_file(target, (11.5, 6.0)) as figure:
        panel = figure.subplots()
        for k, (arm, kind) in enumerate(zip(arms, kinds, strict=True)):
            curve, held_out = arm.curve, arm.curve.kind == "held-out"
            panel.plot(
                curve.seconds,
                curve.nll,
                color=STYLES[kind].color,
                linestyle=LINES[kinds[:k].count(kind) % len(LINES)],
                linewidth=(2.2 if kind == BASELINE else 1.5) if held_out else 0.8,
                marker="." if held_out else "",
                markersize=4,
                zorder=3 if kind == BASELINE else 2,
            )
        if results.target_nll is not None:
            panel.axhline(results.target_nll, color=STYLES[BASELINE].color, lw=0.8, ls=":")
        _limit_loss(panel, arms)
        panel.margins(x=0.12)
        panel.set_xlim(left=0)
        kind_of_loss = {arm.curve.kind for arm in arms}
        label = " or ".join(sorted(kind_of_loss)) + " loss, nats a token"
        dress_panel(panel, "seconds from the start, one-off costs included", label)
        _legend(figure, arms, markers=False)
        ends = [(arm.curve.seconds[-1], arm.curve.nll[-1]) for arm in arms]
        colors = [STYLES[kind].color for kind in kinds]
        label_points(panel, [arm.name for arm in arms], ends, colors)


@contextmanager
def figure_file(target: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Yield a figure that is written as PNG or SVG afterwards, the same bytes for the same data."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "swlora", "text.color": GREY}):
        figure = Figure(figsize=size, layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        yield figure
        figure.set_layout_engine("none")  # labels were placed for the layout that was drawn
        ending = target.suffix.lstrip(".")
        metadata = {"Date": None} if ending == "svg" else {}
        with atomic_path(target) as scratch:
            figure.savefig(scratch, format=ending, dpi=160, transparent=True, metadata=metadata)


def _draw_arm(panel: Any, arm: FinishedArm, score: str, baseline: FinishedArm | None) -> None:
    style, seconds = STYLES[_kind(arm)], arm.time_spread.total_s
    x, y = arm.total_s, arm.scores.measured(score)
    low, high = arm.intervals.get(score, (y, y))
    if baseline:
        low, high = y, y
        if found := arm.against_baseline.get(score):  # none for the baseline itself
            origin = baseline.scores.measured(score)
            y = origin + found.difference  # of the seeds that both have
            low, high = (origin + bound for bound in found.interval)
    panel.errorbar(
        x,
        y,
        xerr=[[x - seconds.min], [seconds.max - x]],
        yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
        color=style.color,
        marker=style.marker,
        markersize=style.size,
        linewidth=1,
        capsize=2,
        zorder=3,
    )


def _draw_margin(panel: Any, baseline: FinishedArm, score: str, worse: float) -> None:
    color, half_s = STYLES[BASELINE].color, baseline.total_s / 2
    value = baseline.scores.measured(score)
    panel.axhline(value, color=color, linewidth=0.8, linestyle=":", zorder=1)
    low, high = sorted((value, value + worse))
    panel.axhspan(low, high, color=color, alpha=0.18, linewidth=0, zorder=0)
    panel.axvline(half_s, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
    panel.annotate(
        "half the baseline's time",
        (half_s, 0.01),
        xycoords=("data", "axes fraction"),
        color=GREY,
        fontsize=7,
        rotation=90,
        ha="right",
        va="bottom",
    )


def _kind(arm: FinishedArm) -> str:
    if arm.is_baseline:
        return BASELINE
    if arm.control_of:
        return CONTROL
    return FOUND if arm.policy and parse_policy(arm.policy).needs_search else OTHER


def _scale_seconds(panel: Any, arms: Sequence[FinishedArm]) -> None:
    seconds = [arm.total_s for arm in arms]
    if max(seconds) > 8 * min(seconds):
        panel.set_xscale("log")


def _limit_loss(panel: Any, arms: Sequence[FinishedArm]) -> None:
    """Cut off the steep beginning, which would flatten all that differs."""
    ends = [arm.curve.nll[-1] for arm in arms]
    tops = [_at_share(arm.curve.nll, 0.25) for arm in arms]
    low, high = min(min(arm.curve.nll) for arm in arms), max(*ends, *tops)
    room = 0.06 * (high - low) or 0.01
    panel.set_ylim(low - room, high + room)


def _at_share(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, round(share * len(values)))]


def dress_panel(panel: Any, x_label: str, y_label: str) -> None:
    """Label a panel, with axes and a grid that can be read on white and on black."""
    panel.set_xlabel(x_label, color=GREY)
    panel.set_ylabel(y_label, color=GREY)
    panel.tick_params(which="both", colors=GREY)
    panel.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    for side, spine in panel.spines.items():
        spine.set(color=GREY, visible=side in ("left", "bottom"))


def _legend(figure: Any, arms: Sequence[FinishedArm], *, markers: bool) -> None:
    from matplotlib.lines import Line2D

    present = {_kind(arm) for arm in arms}
    handles = [
        Line2D([], [], color=s.color, marker=s.marker if markers else "", ms=s.size, label=kind)
        for kind, s in STYLES.items()
        if kind in present
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=4, frameon=False, labelcolor=GREY
    )
