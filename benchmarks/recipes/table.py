"""The table of a file of results: a line a recipe, held against a baseline.

Seconds are CPU seconds of the process, for the machine may be busy; NLL are nats a token, all as
medians over seeds. A difference is paired: its interval holds the middle 95 % of draws of prompts
and seeds (`swlora.study.statistics`), over the seeds that both recipes have.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks.recipes.recipe import Recipe
from benchmarks.recipes.results import Case
from swlora.errors import UserError
from swlora.evaluation.bootstrap import Draws, Interval, interval, prompt_weights
from swlora.study.statistics import Point, differences, seconds_to

MARGIN_NATS = 0.01
# What a recipe may set and still be plain LoRA with AdamW in all layers
TUNED = frozenset(
    {"steps", "batch", "order", "rate", "beta1", "beta2", "decay", "warmup", "prompts"}
)
HEADER = (
    *("recipe", "seeds", "rows", "nodes", "CPU, s", "wall, s", "dev NLL", "seeds' range"),
    *("difference [95 %]", "CPU : baseline", "steps in half of its CPU s"),
    *("to its NLL + 0.01 : baseline", "test NLL"),
)


def markdown(cases: Sequence[Case], baseline: str | None) -> str:
    """Return the tables of the cases, one for each data set.

    `baseline` is a recipe, of its own data set; elsewhere it is the plain one with the lowest loss.
    Raises UserError where the recipe has no result.
    """
    given = Recipe.parse(baseline) if baseline is not None else None
    if given and not any(c["recipe"] == str(given) and "error" not in c for c in cases):
        raise UserError(f"the baseline {str(given)!r} has no result here")
    parts = []
    for name in dict.fromkeys(case["settings"]["data"] for case in cases):
        own = [case for case in cases if case["settings"]["data"] == name]
        parts += [name, _of(own, given if given and given.data == name else None)]
    return "\n\n".join(parts)


def _of(cases: Sequence[Case], baseline: Recipe | None) -> str:
    good = [case for case in cases if "error" not in case]
    by_recipe: dict[str, list[Case]] = {}
    for case in good:
        by_recipe.setdefault(case["recipe"], []).append(case)
    name = _plainest(by_recipe) if baseline is None else str(baseline)
    base = by_recipe.get(name or "", [])
    lines = [_cells(recipe, own, base) for recipe, own in by_recipe.items()]
    lines.sort(key=lambda cells: float(cells[6]))
    rows = [HEADER, tuple("---" if i == 0 else "---:" for i in range(len(HEADER))), *lines]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    bad = [c for c in cases if "error" in c]
    notes = [f"- {c['recipe']}, seed {c['seed']}: {c['error']}" for c in bad]
    head = [f"baseline: {name or 'none of the recipes is plain LoRA'}", ""]
    return "\n".join([*head, text, *([""] if notes else []), *notes])


def _plainest(by_recipe: dict[str, list[Case]]) -> str | None:
    """Return the plain recipe with the lowest loss, of those with the most seeds; None for none."""
    plain = {
        recipe: (-len(own), median(c["dev"]["nll"] for c in own))
        for recipe, own in by_recipe.items()
        if {word.partition("=")[0] for word in recipe.split()} <= TUNED | {"data"}
    }
    return min(plain, key=lambda recipe: plain[recipe]) if plain else None


def _cells(recipe: str, own: list[Case], base: list[Case]) -> tuple[str, ...]:
    def middle(key: str) -> float:
        return median(case[key] for case in own)

    nll = [case["dev"]["nll"] for case in own]
    test = [case["test"]["nll"] for case in own if "test" in case]
    return (
        recipe,
        str(len(own)),
        f"{middle('rows'):,.0f}",
        f"{middle('nodes'):,.0f}",
        f"{middle('cpu_s'):.1f}",
        f"{middle('wall_s'):.1f}",
        f"{median(nll):.4f}",
        f"{min(nll):.4f} to {max(nll):.4f}" if len(nll) > 1 else "-",
        _difference_cell(own, base),
        *_share_cells(middle("cpu_s") / median(c["cpu_s"] for c in base) if base else None, own[0]),
        _time_cell(own, base),
        f"{median(test):.4f}" if len(test) == len(own) else "-",
    )


def _share_cells(share: float | None, case: Case) -> tuple[str, str]:
    """Return the CPU seconds over the baseline's, and the steps that would take half of those."""
    if share is None:
        return "-", "-"
    return f"{share:.2f}", f"{case['settings']['steps'] / 2 / share:.0f}"


def _difference_cell(own: list[Case], base: list[Case]) -> str:
    if own is base:
        return "baseline"
    found = difference(own, base)
    return f"{found[0]:+.4f} [{found[1].low:+.4f}, {found[1].high:+.4f}]" if found else "-"


def difference(own: list[Case], base: list[Case]) -> tuple[float, Interval] | None:
    """Return how much higher the mean dev NLL is, with its interval; None without common seeds."""
    ours, theirs = ({case["seed"]: case["dev"] for case in cases} for cases in (own, base))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    mean = float(np.mean([ours[seed]["nll"] - theirs[seed]["nll"] for seed in seeds]))
    return mean, interval(
        differences(*({s: _draws(of[s]) for s in seeds} for of in (ours, theirs)))
    )


def _draws(losses: dict[str, Any]) -> Draws:
    """Return the draws (R,) of the NLL of a case."""
    weights = prompt_weights(len(losses["nats"]))
    draws: Draws = (weights @ losses["nats"]) / (weights @ losses["tokens"])
    return draws


def _time_cell(own: list[Case], base: list[Case]) -> str:
    """Return the CPU seconds to the baseline's loss, over the baseline's, on the curves' rows."""
    if not base:
        return "-"
    target = median(case["curve"][-1]["nll"] for case in base) + MARGIN_NATS
    times = [seconds_to(target, _points(case)) for case in own]
    reached = [seconds for seconds in times if seconds is not None]
    if len(reached) < len(times):
        return f"not reached by {len(times) - len(reached)}"
    return f"{median(reached) / median(c['cpu_s'] for c in base):.2f}"


def _points(case: Case) -> list[Point]:
    return [Point(p["step"], p["cpu_s"], p["nll"]) for p in case["curve"]]
