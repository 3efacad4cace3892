"""The results of a study as tables: columns for Markdown, and one row an arm as CSV.

Nothing is computed here but how a number looks.
"""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from swlora.evaluation.scales import SCALES
from swlora.layer_policy import EN_DASH, layer_ranges
from swlora.plural import counted
from swlora.result_json import as_json
from swlora.study.compared import (
    ArmResult,
    Beam,
    FinishedArm,
    Published,
    Unfinished,
)
from swlora.study.spec import rate_name

Row = TypeVar("Row")
Column = tuple[str, Callable[[Row], str]]
Judged = FinishedArm | Beam  # scores by one way of decoding

NONE = "n/a"
SCORE_DIGITS = {name.lower(): scale.digits for name, scale in SCALES.items()}
SCORE_NAMES = {name.lower(): scale.name for name, scale in SCALES.items()}


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """Write a number with a true minus sign, n/a for None."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def span(bounds: Sequence[float], digits: int, *, sign: bool = False) -> str:
    """Write an interval."""
    low, high = (number(bound, digits, sign=sign) for bound in bounds)
    return f"[{low}, {high}]"


def csv_table(arms: Sequence[ArmResult]) -> str:
    """Return one row an arm: every single value under its dotted name in results.json.

    A list is written with spaces between its items; what is missing is an empty cell.
    """
    rows = [_flat(as_json(arm)) for arm in arms]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in ("runs", "curve", "decode", "rank_pattern") or (prefix and key == "mean"):
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            listed = isinstance(value, list)
            flat[prefix + key] = " ".join(map(str, value)) if listed else value
    return flat


def markdown_table(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    header = "| " + " | ".join(name for name, _ in columns) + " |"
    rule = "|---|" + "---:|" * (len(columns) - 1)
    lines = [
        "| " + " | ".join(cell(row).replace("|", "\\|") for _, cell in columns) + " |"
        for row in rows
    ]
    return "\n".join([header, rule, *lines])


def _name(arm: ArmResult | Beam) -> str:
    return f"**{arm.name}** (baseline)" if arm.is_baseline else arm.name


def _seeds(arm: Judged) -> str:
    done, planned = len(arm.seeds), len(arm.planned_seeds)
    return str(done) if done == planned else f"{done} of {planned}"


def _with_interval(name: str) -> Callable[[Judged], str]:
    def cell(arm: Judged) -> str:
        digits, bounds = SCORE_DIGITS[name], arm.intervals.get(name)
        return number(arm.scores[name], digits) + (f" {span(bounds, digits)}" if bounds else "")

    return cell


def _difference(name: str) -> Callable[[Judged], str]:
    def cell(arm: Judged) -> str:
        found, digits = arm.against_baseline.get(name), SCORE_DIGITS[name] + 1
        if found is None:
            return ""
        difference = number(found.difference, digits, sign=True)
        return f"{difference} {span(found.interval, digits, sign=True)}"

    return cell


def _verdict(name: str) -> Callable[[Judged], str]:
    def cell(arm: Judged) -> str:
        found = arm.against_baseline.get(name)
        if found is None:
            return ""
        return found.verdict + _how_sure(arm.seeds if found.seeds is None else found.seeds)

    return cell


def _how_sure(seeds: Sequence[int]) -> str:
    """Say where a difference knows little of seeds; older versions noted none that are common."""
    return {0: " (other seeds)", 1: " (one seed)"}.get(len(seeds), "")


def verdict_columns(names: Sequence[str]) -> list[Column[Judged]]:
    """The named scores with intervals, differences from the baseline, and verdicts."""
    columns: list[Column[Judged]] = [("arm", _name), ("seeds", _seeds)]
    for name in names:
        shown = SCORE_NAMES[name]
        columns += [
            (f"{shown} [95 %]", _with_interval(name)),
            (f"difference in {shown} [95 %]", _difference(name)),
            (f"verdict on {shown}", _verdict(name)),
        ]
    return columns


def _faster(key: str) -> Callable[[FinishedArm], str]:
    def cell(arm: FinishedArm) -> str:
        found = arm.acceleration
        if found is None:
            return NONE
        if "nll" in key and found.reached_baseline_nll is False:
            return "not reached"
        return number(getattr(found, key), 1, sign="percent" in key)

    return cell


def time_columns() -> list[Column[FinishedArm]]:
    """Speed and seconds, absolute and against the baseline."""
    return [
        ("arm", _name),
        ("examples/s", lambda arm: number(arm.examples_per_s)),
        ("speed-up, %", _faster("speed_up_percent")),
        ("training, s", lambda arm: number(arm.train_s)),
        ("to the end, s", lambda arm: number(arm.total_s)),
        ("time saved, %", _faster("time_saved_percent")),
        ("to the baseline's NLL, s", _faster("seconds_to_baseline_nll")),
        ("time saved to it, %", _faster("time_saved_to_baseline_nll_percent")),
        ("choice of its rate, s", _rate_choice),
    ]


def _rate_choice(arm: FinishedArm) -> str:
    return number(arm.rate_choice.cost_s if arm.rate_choice else None)


def score_columns() -> list[Column[FinishedArm]]:
    """All scores with intervals, and the loss of English text."""
    return [
        ("arm", _name),
        *((name, _with_interval(key)) for key, name in SCORE_NAMES.items()),
        ("English perplexity", _english),
    ]


def _english(arm: FinishedArm) -> str:
    before, after = arm.english_perplexity_before, arm.english_perplexity
    if after is None:  # it was not measured
        return NONE
    return f"{number(before, 1)} → {number(after, 1)}"


def beam_columns() -> list[Column[Judged]]:
    """The scores of decoding with beam search; the loss does not depend on decoding."""
    scores = [(name, _with_interval(key)) for key, name in SCORE_NAMES.items() if key != "nll"]
    return [*verdict_columns(["bleu"]), *scores[1:]]


def spread_columns() -> list[Column[FinishedArm]]:
    """How far the seeds of an arm lie apart."""

    def cell(name: str) -> Callable[[FinishedArm], str]:
        def spread(arm: FinishedArm) -> str:
            found = arm.spread.get(name)
            if found is None:
                return NONE
            low, high = (number(end, SCORE_DIGITS[name]) for end in (found.min, found.max))
            return f"{low} to {high} (sd {number(found.sd, SCORE_DIGITS[name] + 1)})"

        return spread

    def total(arm: FinishedArm) -> str:
        found = arm.time_spread.total_s
        return f"{number(found.min)} to {number(found.max)}"

    names = [(shown, cell(name)) for name, shown in SCORE_NAMES.items()]
    return [("arm", _name), ("seeds", _seeds), ("to the end, s", total), *names]


def arm_columns() -> list[Column[FinishedArm]]:
    """What was trained: method, layers, sizes, rate."""
    return [
        ("arm", _name),
        ("method", lambda arm: arm.method),
        ("layers", lambda arm: layer_ranges(arm.layers, EN_DASH)),
        ("rank", _rank),
        ("epochs", lambda arm: str(arm.epochs)),
        ("learning rate", _rate),
        ("trained weights", lambda arm: f"{arm.n_trainable:,}"),
        ("adapter, MB", lambda arm: _scaled(arm.adapter_bytes, 1e6, 2)),
        ("peak memory, GB", lambda arm: _scaled(arm.peak_memory_bytes, 1e9, 2)),
        ("control of", lambda arm: arm.control_of or ""),
    ]


def _rank(arm: FinishedArm) -> str:
    pattern = arm.rank_pattern
    if not pattern:
        return NONE if arm.rank is None else str(arm.rank)
    ranks = list(pattern.values())
    return (
        f"{min(ranks)} to {max(ranks)}, {sum(ranks)} in {counted(len(ranks), 'matrix', 'matrices')}"
    )


def _rate(arm: FinishedArm) -> str:
    at_edge = arm.rate_choice is not None and arm.rate_choice.at_edge
    return rate_name(arm.learning_rate) + (" (edge of the grid)" if at_edge else "")


def rate_table(arms: Sequence[ArmResult]) -> str:
    """Return the held-out NLL that each learning rate of an arm's grid led to."""
    choices = {arm.name: arm.rate_choice for arm in arms if arm.rate_choice}
    tried = {rate for choice in choices.values() for rate in choice.nll}

    def loss(rate: str) -> Callable[[ArmResult], str]:
        def cell(arm: ArmResult) -> str:
            choice = choices[arm.name]
            if rate not in choice.nll:
                return ""
            nll, chosen = choice.nll[rate], choice.chosen
            text = "no result" if nll is None else number(nll, SCORE_DIGITS["nll"])
            return f"**{text}**" if chosen is not None and rate_name(chosen) == rate else text

        return cell

    columns = [(rate, loss(rate)) for rate in sorted(tried, key=float)]
    return markdown_table([("arm", _name), *columns], arms)


def _scaled(value: float | None, unit: float, digits: int) -> str:
    return number(None if value is None else value / unit, digits)


UNFINISHED_COLUMNS: list[Column[Unfinished]] = [
    ("run", lambda row: row.run),
    ("status", lambda row: row.status),
    ("reason", lambda row: " ".join((row.reason or "not known").split())),
]
PUBLISHED_COLUMNS: list[Column[Published]] = [
    ("method", lambda row: row.method),
    ("faster than LoRA, %", lambda row: number(row.acceleration_percent, 2)),
    ("quality", lambda row: number(row.quality, 2)),
]
