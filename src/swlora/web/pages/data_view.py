"""What a training says of its data, as names and values for a person."""

from collections.abc import Mapping
from typing import Any

from swlora.data.summary import DataSummary, Fact, doubtful_facts, split_facts, step_facts
from swlora.result_json import from_json
from swlora.web.pages.identified_view import tried
from swlora.web.pages.run_facts import part, plain


def data_facts(result: Mapping[str, Any]) -> list[Fact]:
    """Return what the block "data" of a result says; empty where it is not there or not ours."""
    found = tried(_facts, part(result, "data")) or []
    return [(plain(name[:1].upper() + name[1:]), plain(value)) for name, value in found]


def _facts(block: dict[str, Any]) -> list[Fact]:
    summary = from_json(DataSummary, block)
    steps = step_facts(summary.steps) if summary.steps else []
    return [*split_facts(summary.train), *steps, *doubtful_facts(summary)]
