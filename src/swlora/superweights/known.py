"""Super weights that were published, and whether a search agrees with them.

The data file names a source for every coordinate. A model is found by its exact id on the Hub, the
case of letters aside; a model that is not listed has nothing to agree with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from swlora.models.anatomy import WeightAddress


@dataclass(frozen=True)
class KnownWeight:
    """One published coordinate, with the places that published it.

    `misprint` says why it cannot be meant as printed; such an entry is never expected to be found.
    """

    address: WeightAddress
    sources: tuple[str, ...]
    note: str = ""
    misprint: str = ""


@dataclass(frozen=True)
class Agreement:
    """Published coordinates against verified ones, each a list of addresses in their order.

    `harmless` ones, which result.json calls so, were candidates whose ablation proved nothing: it
    may have done much. `extra` ones are verified here and published nowhere.
    """

    verified: list[WeightAddress]
    harmless: list[WeightAddress]
    not_found: list[WeightAddress]
    extra: list[WeightAddress]
    sources: list[str]


def known_weights(model_id: str) -> list[KnownWeight]:
    """Return what was published for the model with this Hub id, misprints included; often []."""
    return list(_table().get(model_id.casefold(), ()))


def compare(model_id: str, candidates: Sequence[tuple[WeightAddress, str]]) -> Agreement | None:
    """Compare published coordinates with (address, verdict) of candidates; None where none are."""
    published = [known for known in known_weights(model_id) if not known.misprint]
    if not published:
        return None
    verdicts = dict(candidates)
    addresses = [known.address for known in published]
    proved = [address for address, verdict in candidates if verdict != "none"]
    return Agreement(
        verified=[a for a in addresses if a in proved],
        harmless=[a for a in addresses if verdicts.get(a) == "none"],
        not_found=[a for a in addresses if a not in verdicts],
        extra=[a for a in proved if a not in addresses],
        sources=list(dict.fromkeys(source for known in published for source in known.sources)),
    )


def describe(agreement: Agreement) -> str:
    """Say in one line how the published coordinates fared."""
    fates = {
        "verified here": agreement.verified,
        "a candidate, but not proved when zeroed alone": agreement.harmless,
        "no candidate here": agreement.not_found,
        "verified here and not published": agreement.extra,
    }
    said = [f"{fate}: {', '.join(map(str, where))}" for fate, where in fates.items() if where]
    return f"published super weights ({'; '.join(agreement.sources)}): {'; '.join(said)}"


@cache
def _table() -> dict[str, list[KnownWeight]]:
    """Read the data file: Hub id in lower case -> coordinates, their sources written out."""
    path = resources.files("swlora.superweights").joinpath("known_super_weights.yaml")
    content = yaml.safe_load(path.read_text("utf-8"))

    def known(entry: dict[str, Any]) -> KnownWeight:
        where = {name: entry[name] for name in ("layer", "module", "out_channel", "in_channel")}
        sources = tuple(content["sources"][name] for name in entry["sources"])
        remarks = entry.get("note", ""), entry.get("misprint", "")
        return KnownWeight(WeightAddress(**where), sources, *remarks)

    return {
        model_id.casefold(): [known(entry) for entry in entries]
        for model_id, entries in content["models"].items()
    }
