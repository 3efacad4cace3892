"""What the page of the super weights shows: the weights that may be switched off, and their proof.

The weights are those that the server offers, which were found in the very model that it serves;
interval, controls and pictures come from the `identify` runs in which they were found.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from swlora.models.anatomy import WeightAddress
from swlora.superweights.report import answer, interval, number
from swlora.web.folders import run_result
from swlora.web.pages.charts import Chart, Series, line_chart
from swlora.web.service import Service
from swlora.web.weights import OfferedWeight, weight_id

Result = dict[str, Any]

NOT_MEASURED = "not measured here"
# What a result.json may raise that another version, or somebody else, has written
ODD = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


@dataclass(frozen=True)
class WeightRow:
    """A weight as it stands in the list."""

    id: str
    layer: int
    module: str
    out_channel: int
    in_channel: int
    value: str
    ratio: str
    interval: str
    control: str
    verdict: str
    source: str
    run: str | None


@dataclass(frozen=True)
class Finding:
    """An `identify` run as it is shown: what it says in sentences, and its charts."""

    run: str
    sentences: list[str]
    charts: list[Chart]


def weight_rows(service: Service) -> list[WeightRow]:
    """Return the weights that may be switched off, those with the best proof first."""
    offered = service.weights.offered().values()
    known = {run: _candidates(_result(service, run)) for run in {w.run for w in offered if w.run}}
    return [_row(w, known.get(w.run or "", {}).get(w.id, {})) for w in offered]


def finding(service: Service, rows: Iterable[WeightRow], wanted: str) -> Finding | None:
    """Return the run that is asked for, else the one with the best proof; None without any.

    A run of another model is none: nothing that it found is a weight of this one.
    """
    ids = {row.id: row.run for row in rows}
    names = [name for name in (wanted, *ids.values()) if name]
    for name in names:
        result = _result(service, name)
        if ids.keys() & _candidates(result).keys():
            said = [line[:1].upper() + line[1:] for line in _tried(answer, result) or []]
            return Finding(name, said, charts(result))
    return None


def charts(result: Result) -> list[Chart]:
    """Return the pictures of an identification, as far as its result holds their numbers."""
    builders: list[Callable[[Result], Chart | None]] = [_outputs, _inputs, _path, _doses]
    drawn = (_tried(build, result) for build in builders)
    return [chart for chart in drawn if chart is not None]


def _result(service: Service, run: str) -> Result:
    entry = service.folders.runs().get(run)
    found = run_result(entry).get("identify") if entry else None
    return found if isinstance(found, dict) else {}


def _candidates(result: Result) -> dict[str, Result]:
    found = {}
    for candidate in _tried(list, result.get("candidates")) or []:
        address = _tried(_address, candidate)
        if address is not None:
            found[weight_id(address)] = candidate
    return found


def _address(candidate: Result) -> WeightAddress:
    names = ("layer", "module", "out_channel", "in_channel")
    return WeightAddress(**{name: candidate[name] for name in names})


def _row(weight: OfferedWeight, candidate: Result) -> WeightRow:
    a = weight.address
    control = _tried(number, candidate.get("largest_control"))
    return WeightRow(
        id=weight.id,
        layer=a.layer,
        module=a.module,
        out_channel=a.out_channel,
        in_channel=a.in_channel,
        value=f"{weight.value:.3f}".replace("-", "−"),
        ratio=NOT_MEASURED if weight.ratio is None else number(weight.ratio),
        interval=_tried(interval, candidate) or "",
        control=control or "",
        verdict=weight.verdict or "",
        source=weight.source,
        run=weight.run,
    )


def _tried(build: Callable[[Any], Any], value: Any) -> Any:
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
