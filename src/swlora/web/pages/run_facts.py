"""What a run was, and what came out of it, as names and values for a person."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swlora.config import settings_of
from swlora.data.sources import SAMPLE_SOURCE
from swlora.evaluation.scales import SCALES, TEXT_SCALES
from swlora.layer_policy import EN_DASH, layer_ranges, policy_or_none
from swlora.progress import duration
from swlora.web.folders import without_folders
from swlora.web.pages.charts import finite
from swlora.web.pages.run_files import adapter_bytes, read_config

Fact = tuple[str, str]

PERPLEXITIES = {
    "english_perplexity_before": "English perplexity before",
    "english_perplexity": "English perplexity",
}
TRAINED = ("train", "train-eval")
MAX_OWN_SCORES = 20  # shown of a metric of one's own


def run_facts(
    folder: Path, facts: Mapping[str, Any], result: Mapping[str, Any], n_steps: float | None
) -> list[Fact]:
    """Return what a run worked on and how; `n_steps` is how far its training has come."""
    config, command = read_config(folder), facts.get("command")
    model, data = part(config, "model"), part(config, "data")
    found = [("Model", facts.get("model_source") or model.get("name"))]
    if command != "identify":
        found.append(("Data", facts.get("data_source") or data.get("name")))
    if command in TRAINED:
        found += _training(config, part(result, "train"), n_steps)
    found.append(("Adapter", _adapter(folder, facts)))
    if command in ("eval", "train-eval"):
        found += _evaluation(part(result, "eval"))
    found += [
        ("dtype", model.get("dtype")),
        ("Seed", facts.get("seed")),
        ("Time", _timings(facts.get("timings_s"))),
        ("Versions", _versions(facts.get("packages"))),
    ]
    return [(name, plain(value)) for name, value in found if plain(value)]


def scores(result: Mapping[str, Any]) -> list[Fact]:
    """Return the scores of an evaluation that are there, on the scales of papers."""
    evaluated = part(result, "eval")
    units = {"NLL": "NLL, nats a token"}
    found = []
    for name, scale in (SCALES | TEXT_SCALES).items():
        value = finite(evaluated.get("nll" if name == "NLL" else name))
        if value is not None:
            found.append((units.get(name, scale.name), scale.number(value)))
    own = [(str(name)[:60], finite(value)) for name, value in part(evaluated, "own").items()]
    found += [(name, f"{value:.4g}") for name, value in own[:MAX_OWN_SCORES] if value is not None]
    measured = [(label, finite(evaluated.get(name))) for name, label in PERPLEXITIES.items()]
    return found + [(label, f"{value:.1f}") for label, value in measured if value is not None]


def is_of_sample(facts: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Say whether a run worked on the rows that swlora makes itself.

    A run from before that was recorded tells by the words with which its source begins.
    """
    if "is_sample" in facts:
        return facts["is_sample"] is True
    sources = (facts.get("data_source"), part(result, "eval").get("data"))
    return any(str(source).startswith(SAMPLE_SOURCE) for source in sources)


def part(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a part of a JSON object that is one itself; else an empty one."""
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def plain(value: Any) -> str:
    """Write a value of a file as text without the folders of this machine; "" for a tree."""
    if value is None or isinstance(value, dict | list | bool):
        return ""
    number = finite(value)
    if number is not None:
        return f"{number:,.0f}" if number.is_integer() else f"{number:g}"
    return without_folders(str(value)[:500]) if isinstance(value, str) else ""


def _training(
    config: Mapping[str, dict[str, Any]], trained: dict[str, Any], n_steps: float | None
) -> list[tuple[str, Any]]:
    adapter, train = part(config, "adapter"), part(config, "train")
    method = adapter.get("method")
    settings = settings_of(plain(method))
    taken = {name: adapter.get(name) for name in ("rank", "alpha", "dropout") if name in settings}
    memory, n_trainable = (finite(trained.get(k)) for k in ("peak_memory_bytes", "n_trainable"))
    return [
        ("Method", method),
        *((name.capitalize(), value) for name, value in taken.items()),
        ("Targets", _listed(adapter.get("targets"))),
        ("Layers", _layers(adapter.get("layers"), trained.get("layers"))),
        ("Trained weights", n_trainable),
        ("Rows", trained.get("rows")),
        ("Epochs", trained.get("epochs") or train.get("epochs")),
        ("Steps", _steps(finite(trained.get("steps")) or n_steps, trained.get("planned_steps"))),
        ("Batch size", trained.get("batch_size") or train.get("batch_size")),
        ("Learning rate", trained.get("learning_rate") or train.get("learning_rate")),
        ("Peak memory", None if memory is None else f"{memory / 1e9:.2f} GB"),
    ]


def _steps(n_steps: float | None, planned: Any) -> str:
    """Write how many steps were done, and where they ended early, of how many."""
    asked = finite(planned)
    said = plain(n_steps)
    return f"{said} of {asked:,.0f}" if said and asked and n_steps != asked else said


def _evaluation(evaluated: dict[str, Any]) -> list[tuple[str, Any]]:
    decode = part(evaluated, "decode")
    beams, temperature = finite(decode.get("num_beams")), finite(decode.get("temperature"))
    how = "greedy"
    if beams is not None and beams > 1:
        how = f"{beams:.0f} beams"
    elif temperature:
        how = f"sampled at temperature {temperature:g}"
    return [
        ("Evaluated on", evaluated.get("split") and f"{evaluated['split']} split"),
        ("Prompts", evaluated.get("n_prompts")),
        ("Decoding", how if decode else None),
    ]


def _layers(policy: Any, layers: Any) -> str:
    """Write the layers, and behind them the policy that chose them."""
    asked = plain(policy)
    try:
        ranges = layer_ranges(layers, EN_DASH) if layers else ""
    except (TypeError, ValueError, IndexError, KeyError):
        ranges = ""
    policy = policy_or_none(asked)
    if ranges and asked and not (policy and policy.kind == "list"):
        return f"{ranges} ({asked})"
    return ranges or asked


def _adapter(folder: Path, facts: Mapping[str, Any]) -> str:
    sizes = {name: adapter_bytes(folder / name) for name in ("adapter", "best")}
    left = [f"{name}/ ({n / 1e6:.2f} MB)" for name, n in sizes.items() if n is not None]
    return ", ".join(left) or plain(facts.get("adapter"))


def _listed(value: Any) -> str:
    return ", ".join(map(plain, value[:20])) if isinstance(value, list) else plain(value)


def _timings(timings: Any) -> str:
    steps = timings.items() if isinstance(timings, dict) else ()
    return ", ".join(
        f"{str(name).replace('_', ' ')} {duration(seconds)}"
        for name, value in steps
        if (seconds := finite(value)) is not None and seconds >= 0.5
    )


def _versions(packages: Any) -> str:
    found: Sequence[tuple[Any, Any]] = (
        list(packages.items())[:20] if isinstance(packages, dict) else ()
    )
    return ", ".join(f"{name} {plain(version)}" for name, version in found)
