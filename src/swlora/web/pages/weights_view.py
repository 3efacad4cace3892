"""What the page of the super weights shows: the weights that may be set to zero, and their proof.

The weights are those that the server offers, which were found in the very model that it serves;
interval, controls and pictures come from the `identify` runs in which they were found.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from swlora.models.anatomy import WeightAddress
from swlora.superweights.tables import interval, number
from swlora.web.folders import run_result
from swlora.web.pages.identified_view import Identified, Result, identified_view, tried
from swlora.web.service import Service
from swlora.web.weights import OfferedWeight, weight_id

NOT_MEASURED = "not measured here"


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
    """An `identify` run, and what it says."""

    run: str
    identified: Identified | None


def weight_rows(service: Service) -> list[WeightRow]:
    """Return the weights that may be set to zero, those with the best proof first."""
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
            return Finding(name, identified_view(result))
    return None


def _result(service: Service, run: str) -> Result:
    entry = service.folders.runs().get(run)
    found = run_result(entry).get("identify") if entry else None
    return found if isinstance(found, dict) else {}


def _candidates(result: Result) -> dict[str, Result]:
    found = {}
    for candidate in tried(list, result.get("candidates")) or []:
        address = tried(_address, candidate)
        if address is not None:
            found[weight_id(address)] = candidate
    return found


def _address(candidate: Result) -> WeightAddress:
    names = ("layer", "module", "out_channel", "in_channel")
    return WeightAddress(**{name: candidate[name] for name in names})


def _row(weight: OfferedWeight, candidate: Result) -> WeightRow:
    a = weight.address
    control = tried(number, candidate.get("largest_control"))
    return WeightRow(
        id=weight.id,
        layer=a.layer,
        module=a.module,
        out_channel=a.out_channel,
        in_channel=a.in_channel,
        value=f"{weight.value:.3f}".replace("-", "−"),
        ratio=NOT_MEASURED if weight.ratio is None else number(weight.ratio),
        interval=tried(lambda found: interval(*found["interval"]), candidate) or "",
        control=control or "",
        verdict=weight.verdict or "",
        source=weight.source,
        run=weight.run,
    )
