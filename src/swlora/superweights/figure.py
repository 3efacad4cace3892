"""The picture of a scan: largest activation of every projection against the layer."""

from pathlib import Path

from swlora.errors import UserError
from swlora.files import atomic_path
from swlora.superweights.detect import Scan

FORMATS = (".png", ".svg", ".pdf")


def check_format(target: Path) -> None:
    """Refuse a file name whose ending is no picture format, before the work is done."""
    if target.suffix.lower() not in FORMATS:
        raise UserError(f"the figure {target} must end in {', '.join(FORMATS)}")


def draw_scan(scan: Scan, title: str, target: Path) -> None:
    """Draw largest |input| and |output| per layer, one line a projection, as PNG, SVG or PDF."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True)
    names = list(dict.fromkeys(m.module for m in scan.modules))
    for panel, side in zip(panels, ("input", "output"), strict=True):
        for name in names:
            rows = [m for m in scan.modules if m.module == name]
            values = [abs(getattr(m, side).value) for m in rows]
            panel.plot([m.layer for m in rows], values, marker="o", markersize=3, label=name)
        panel.set_yscale("log")
        panel.set_xlabel("layer")
        panel.set_ylabel(f"largest |{side}|")
        panel.set_title(f"{side}s", fontsize=10)
        panel.grid(True, alpha=0.3)
    panels[1].legend(fontsize=8, loc="best")
    figure.suptitle(title)
    with atomic_path(target) as scratch:
        figure.savefig(scratch, format=target.suffix.lower().lstrip("."), dpi=140)
