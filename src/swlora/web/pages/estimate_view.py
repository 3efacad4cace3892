"""What a training would do and take, as the page shows it: from `swlora train --dry-run`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swlora.data.summary import Fact
from swlora.disk_space import size
from swlora.layer_policy import EN_DASH, layer_ranges
from swlora.progress import duration
from swlora.web.pages.charts import finite
from swlora.web.pages.errand_view import ErrandView, as_on_page, outcome
from swlora.web.pages.run_facts import part
from swlora.web.training.errands import Errand


@dataclass(frozen=True)
class EstimateView(ErrandView):
    """An estimate; one that is done may say why a training would be refused."""

    facts: list[Fact] = field(default_factory=list)


def estimate_view(errand: Errand | None) -> EstimateView:
    """Return what is shown of an estimate."""
    state, problem, result = outcome(errand)
    if result is None:
        return EstimateView(state, problem)
    refused = result.get("refused")
    problem = as_on_page(refused) if isinstance(refused, str) else ""
    return EstimateView(state, problem, [fact for fact in _facts(result) if fact[1]])


def _facts(found: Mapping[str, Any]) -> list[Fact]:
    time, memory = part(found, "time"), part(found, "memory")
    disk = [n for value in part(found, "disk").values() if (n := finite(value)) is not None]
    return [
        ("Time", _of(time, "train_s", lambda s: f"about {duration(s)}")),
        ("Steps", _of(found, "n_steps", "{:,.0f}".format)),
        ("Learning rate", _rate(found)),
        ("Memory at the peak", _of(memory, "peak_bytes", size)),
        ("Free now", _of(memory, "free_bytes", size)),
        ("Disk, in the run's folder", size(sum(disk)) if disk else ""),
        ("Trained weights", _of(found, "n_trainable", "{:,.0f}".format)),
        ("Layers", _layers(found)),
        ("Tokens", _tokens(found)),
    ]


def _of(tree: Mapping[str, Any], name: str, write: Any) -> str:
    value = finite(tree.get(name))
    return "" if value is None else str(write(value))


def _rate(found: Mapping[str, Any]) -> str:
    rate_of = found.get("learning_rate_of")
    return f"of {rate_of}" if rate_of else _of(found, "learning_rate", "{:g}".format)


def _layers(found: Mapping[str, Any]) -> str:
    layers, search = found.get("layers"), found.get("layers_found_by")
    if not isinstance(layers, list) or not layers:
        return ""
    assumed = f", until {search} has found them" if search else ""
    return layer_ranges(layers, EN_DASH) + assumed


def _tokens(found: Mapping[str, Any]) -> str:
    n_tokens, n_nodes = finite(found.get("n_tokens")), finite(found.get("n_nodes"))
    if n_tokens is None:
        return ""
    run = f", of which {n_nodes:,.0f} are run: shared beginnings once" if n_nodes else ""
    return f"{n_tokens:,.0f}{run}"
