"""Pictures of an identification as PNG, SVG or PDF.

    scan   the largest input and output of every projection against the layer
    path   the super activation through the residual stream, intact and with the weight at zero
    dose   perplexity against the factor on the weight
    sinks  attention on the first position against the layer, of several models

PNG has a white background. SVG and PDF have none: their text and lines are of a middle tone that
can be read on white and on black.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from swlora.errors import UserError
from swlora.files import atomic_path, check_writable
from swlora.superweights.detect import ModuleScan
from swlora.superweights.findings import ActivationPath, DoseCurve

FORMATS = (".png", ".svg", ".pdf")

_MIDDLE, _DARK = "#767676", "#222222"  # _MIDDLE has a contrast of 4.5 to white and black alike
_COLORS = ("#2a7fd4", "#d9541e", "#2e9e5b", "#a45bc9", "#b8860b", "#0f9ba8", "#c2417d")
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_STYLE = {
    "grid.color": _MIDDLE,
    "grid.alpha": 0.3,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "swlora",
}
# The same result gives the same bytes
_UNDATED: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def check_target(target: Path) -> None:
    """Refuse a file that is no picture by its ending or cannot be written, before the work."""
    if target.suffix.lower() not in FORMATS:
        raise UserError(f"the figure {target} must end in {', '.join(FORMATS)}")
    check_writable(target.parent, "--figure")


def draw_scan(
    model: str, modules: Sequence[ModuleScan], layers: Sequence[int], target: Path
) -> None:
    """Draw largest |input| and |output| of every projection per layer, one line a projection.

    `layers` with a verified super weight are marked; `model` is named in the title.
    """

    def draw(panels: list[Any]) -> None:
        names = dict.fromkeys(m.module for m in modules)
        for panel, side in zip(panels, ("input", "output"), strict=True):
            for name, color in zip(names, cycle(_COLORS), strict=False):
                found = [m for m in modules if m.module == name]
                spikes = [m.input if side == "input" else m.output for m in found]
                values = [abs(spike.value) for spike in spikes]
                panel.plot([m.layer for m in found], values, ".-", color=color, label=name)
            for layer in layers:
                panel.axvline(layer, color=_MIDDLE, linestyle=":", zorder=0)
            _log_axis(panel)
            _layer_axis(panel, "layer")
            panel.set_ylabel(f"largest |{side}|")
            panel.set_title(f"{side} of every projection")
        panels[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    marked = "dotted: layers with a verified super weight" if layers else ""
    _figure(f"Largest activations in {model}", marked, 2, draw, target)


def draw_path(path: ActivationPath, target: Path) -> None:
    """Draw the super activation after every layer, intact and with the weight set to zero."""
    lines = {
        "intact": (path.intact, _COLORS[0]),
        "with the weight set to zero": (path.ablated, _COLORS[1]),
        "largest other channel at this token, intact": (path.others, _MIDDLE),
    }

    def draw(panels: list[Any]) -> None:
        for label, (values, color) in lines.items():
            panels[0].plot([abs(value) for value in values], ".-", color=color, label=label)
        _log_axis(panels[0])
        _layer_axis(panels[0], "layer whose output is shown")
        panels[0].set_ylabel(f"|residual stream| at channel {path.address.out_channel}")
        panels[0].legend()

    what = f"{path.name}, token {path.token}"
    _figure("The super activation on its way through the layers", what, 1, draw, target)


def draw_dose(curve: DoseCurve, target: Path) -> None:
    """Draw perplexity against the factor on the weight."""

    def draw(panels: list[Any]) -> None:
        values = [dose.perplexity for dose in curve.points]
        panels[0].plot([dose.scale for dose in curve.points], values, ".-", color=_COLORS[0])
        _log_axis(panels[0])
        panels[0].axvline(1, color=_MIDDLE, linestyle=":", label="the model as it is")
        panels[0].set_xlabel("factor on the weight (0: set to zero)")
        panels[0].set_ylabel("perplexity of the text")
        panels[0].legend()

    _figure("Perplexity as one weight is scaled", curve.name, 1, draw, target)


def draw_sinks(model: str, lines: Mapping[str, Sequence[float]], target: Path) -> None:
    """Draw the mass on the first position of every layer, a line for each model named."""

    def draw(panels: list[Any]) -> None:
        for (label, masses), color in zip(lines.items(), cycle(_COLORS), strict=False):
            panels[0].plot(masses, ".-", color=color, label=label)
        panels[0].set_ylim(0, 1)
        _layer_axis(panels[0], "layer")
        panels[0].set_ylabel("share of attention, mean over heads and queries")
        panels[0].figure.legend(loc="outside lower center")  # lines may be anywhere

    _figure("Attention on the first position", model, 1, draw, target)


def _log_axis(panel: Any) -> None:
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):  # type: ignore[misc]
        """Labels the ticks that LogFormatter labels, as 0.1 rather than 1e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(PlainNumbers())
    panel.yaxis.set_minor_formatter(PlainNumbers(minor_thresholds=(1.5, 0.5)))


def _layer_axis(panel: Any, label: str) -> None:
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel(label)


def _figure(
    title: str, subtitle: str, n_panels: int, draw: Callable[[list[Any]], None], target: Path
) -> None:
    """Let `draw` fill `n_panels` panels side by side; save them under a title of two lines."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = target.suffix.lower().lstrip(".")
    ink = dict.fromkeys(_INKED, _DARK if kind == "png" else _MIDDLE)
    with matplotlib.rc_context(_STYLE | ink), atomic_path(target) as scratch:
        figure = Figure(figsize=(2.8 + 4.2 * n_panels, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle("\n".join(filter(None, (title, subtitle))), fontsize=11)
        draw(list(figure.subplots(1, n_panels, squeeze=False)[0]))
        clear = kind != "png"
        figure.savefig(
            scratch, format=kind, dpi=140, transparent=clear, metadata=_UNDATED.get(kind)
        )
