"""What an identification says: sentences, a table of candidates, charts drawn from its numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swlora.result_json import from_json
from swlora.superweights import findings
from swlora.superweights.report import COLUMNS, answer, rows
from swlora.web.folders import FIGURE_TYPES
from swlora.web.pages.charts import Chart, Series, line_chart

Result = dict[str, Any]

# What a result.json may raise that another version, or somebody else, has written
ODD = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


@dataclass(frozen=True)
class Identified:
    """An identification as it is shown; `candidates` are rows under `head`."""

    sentences: list[str]
    head: list[str]
    candidates: list[tuple[str, ...]]
    charts: list[Chart]
    figures: frozenset[str]  # files of the run whose pictures the charts are


def identified_view(result: Result) -> Identified | None:
    """Return what can be shown of an identification; None where there is nothing."""
    builders: list[tuple[str, Callable[[Result], Chart | None]]] = [
        ("superweights", _outputs),
        ("superweights", _inputs),
        ("superweights-path", _path),
        ("superweights-dose", _doses),
    ]
    drawn = [(name, tried(build, result)) for name, build in builders]
    charts = [(name, chart) for name, chart in drawn if chart is not None]
    whole = tried(lambda tree: from_json(findings.Identified, tree, partial=True), result)
    found = Identified(
        sentences=[line[:1].upper() + line[1:] for line in tried(answer, whole) or []],
        head=list(COLUMNS),
        candidates=tried(rows, whole) or [],
        charts=[chart for _, chart in charts],
        figures=frozenset(name + kind for name, _ in charts for kind in FIGURE_TYPES),
    )
    return found if found.sentences or found.candidates or found.charts else None


def tried(build: Callable[[Any], Any], value: Any) -> Any:
    """Return what can be made of a value that this version may not have written, else None."""
    try:
        return build(value)
    except ODD:
        return None


def _outputs(result: Result) -> Chart | None:
    return _scan(result, "output", "Largest outputs")


def _inputs(result: Result) -> Chart | None:
    return _scan(result, "input", "Largest inputs")


def _scan(result: Result, side: str, title: str) -> Chart | None:
    """The largest input or output of every projection against the layer."""
    lead = result["path"]["module"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for module in result["modules"]:
        point = float(module["layer"]), abs(float(module[side]["value"]))
        lines.setdefault(module["module"], []).append(point)
    layer, value = max(lines[lead], key=lambda point: point[1])
    others = [Series("other projections", line, "faint") for n, line in lines.items() if n != lead]
    return line_chart(
        f"{title} of every projection, by layer",
        f"{lead}: at most {value:,.0f}, in layer {layer:.0f}.",
        ("layer", f"largest |{side}|"),
        [*others, Series(lead, lines[lead], "main", dots=True)],
        log_y=True,
        marks=[(float(n), f"layer {n}") for n in result["layers"]],
    )


def _path(result: Result) -> Chart | None:
    """The super activation after every layer, intact and ablated."""
    path = result["path"]

    def line(name: str) -> list[tuple[float, float]]:
        return [(float(k), abs(float(value))) for k, value in enumerate(path[name])]

    intact, ablated = line("intact"), line("ablated")
    layer = int(path["layer"])
    return line_chart(
        "The super activation on its way through the layers",
        f"Channel {path['out_channel']} after layer {layer}: {intact[layer][1]:,.0f}, and "
        f"{ablated[layer][1]:,.0f} with the weight at zero.",
        ("layer", f"|residual stream|, channel {path['out_channel']}"),
        [
            Series("largest other channel", line("others"), "faint"),
            Series("weight at zero", ablated, "second", dots=True),
            Series("as it is", intact, "main", dots=True),
        ],
        log_y=True,
    )


def _doses(result: Result) -> Chart | None:
    """Perplexity against the factor on the weight."""
    points = [(float(p["scale"]), float(p["perplexity"])) for p in result["dose_curve"]["points"]]
    least = min(points, key=lambda point: point[1])
    return line_chart(
        "Perplexity as this one weight is scaled",
        f"At zero times its value: {points[0][1]:.1f}. The least is {least[1]:.1f}, at "
        f"{least[0]:g} times.",
        ("factor on the weight", "perplexity of the text"),
        [Series("perplexity", points, "main", dots=True)],
        log_y=True,
        marks=[(1.0, "as it is")],
    )
