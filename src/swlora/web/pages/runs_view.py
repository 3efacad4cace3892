"""What the pages of the runs show: a line for every run, and one run with its loss curve.

A run folder is read as it is at that moment: half written, torn, or of another version, it gives
less on the page and never an error.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.errors import UserError
from swlora.evaluation.loss_curve import Point, smoothed
from swlora.progress import duration
from swlora.runs import read_metrics
from swlora.study.live import snapshot
from swlora.web.folders import RunEntry, run_figures, run_result, run_summary
from swlora.web.page_api import without_paths
from swlora.web.pages.charts import Chart, Series, finite, line_chart

MAX_SHOWN = 200
QUIET_S = 600.0  # a training that says nothing for that long may have been killed
LOOKS = {
    "done": "good",
    "running": "busy",
    "failed": "bad",
    "cancelled": "bad",
    "incomplete": "bad",
}
SCORES = (("BLEU", 4), ("NIST", 3), ("METEOR", 4), ("ROUGE_L", 4), ("CIDEr", 3), ("nll", 3))


@dataclass(frozen=True)
class RunRow:
    """A run in the list; `quiet` says for how long a running one has said nothing."""

    name: str
    command: str
    status: str
    look: str
    started: str
    took: str
    headline: str
    quiet: str


@dataclass(frozen=True)
class RunView:
    """One run: its row, numbers (name, value) and pictures."""

    row: RunRow
    numbers: list[tuple[str, str]]
    chart: Chart | None
    figures: list[str]
    facts: list[tuple[str, str]]
    has_adapter: bool
    has_identified: bool


def run_rows(entries: Iterable[RunEntry]) -> list[RunRow]:
    """Return the runs that can be read, the newest first."""
    found = []
    for entry in entries:
        try:
            found.append((entry, run_summary(entry)))
        except UserError:  # it is just being written or removed
            continue
    found.sort(key=lambda pair: str(pair[1]["started_at"]), reverse=True)
    return [_row(entry, facts) for entry, facts in found[:MAX_SHOWN]]


def run_view(entry: RunEntry, adapters: Iterable[str]) -> RunView:
    """Return one run; UserError where it cannot be read just now."""
    facts = run_summary(entry)
    metrics = [row for row in read_metrics(entry.folder) if isinstance(row, dict)]
    result = without_paths(run_result(entry))
    return RunView(
        row=_row(entry, facts),
        numbers=[*_progress(metrics), *_scores(result)],
        chart=loss_chart(metrics),
        figures=[name for name in run_figures(entry) if name != "loss.png"],
        facts=_facts(facts, result),
        has_adapter=entry.name in adapters,
        has_identified=isinstance(result.get("identify"), dict),
    )


def loss_chart(metrics: Sequence[dict[str, Any]]) -> Chart | None:
    """Return the loss of every step, its smoothed course, and that on held-out rows."""
    steps = _points(metrics, lambda row: row["loss"])
    held_out = _points(metrics, lambda row: row["eval_sum_nats"] / row["eval_n_tokens"])
    if not steps:
        return None
    course = smoothed(steps)
    low = min(y for _, y in [*steps, *held_out])
    high = max(y for _, y in [*course, *held_out])  # single steps may rise above the picture
    said = f"From {course[0][1]:.3f} at step {course[0][0]:.0f} to {course[-1][1]:.3f} at step "
    said += f"{course[-1][0]:.0f}."
    if held_out:
        said += f" On held-out rows at last {held_out[-1][1]:.3f}."
    return line_chart(
        "Loss",
        said,
        ("step", "nats a token"),
        [
            Series("every step", steps, "faint"),
            Series("held-out rows", held_out, "second", dots=True),
            Series("smoothed", course, "main"),
        ],
        y_range=(low, high),
    )


def status_look(status: str) -> str:
    """Return how a status is coloured."""
    return LOOKS.get(status, "plain")


def shown_time(stamp: Any) -> str:
    """Write 2026-11-23T12:34:27Z as a person does; "" for what is no time."""
    return stamp[:16].replace("T", " ") if isinstance(stamp, str) else ""


def _points(metrics: Sequence[dict[str, Any]], value: Any) -> list[Point]:
    points = []
    for row in metrics:
        try:
            x, y = finite(row["step"]), finite(value(row))
        except (KeyError, TypeError, ZeroDivisionError, OverflowError):
            continue
        if x is not None and y is not None:
            points.append((x, y))
    return points


def _row(entry: RunEntry, facts: dict[str, Any]) -> RunRow:
    status = str(facts["status"])
    timings = facts["timings_s"]
    total_s = finite(timings.get("total")) if isinstance(timings, dict) else None
    is_running = status == "running"
    return RunRow(
        name=entry.name,
        command=str(facts["command"]),
        status=status,
        look=status_look(status),
        started=shown_time(facts["started_at"]),
        took="" if total_s is None or is_running else duration(total_s),
        headline=_headline(entry, facts),
        quiet=_quiet(entry.folder) if is_running else "",
    )


def _headline(entry: RunEntry, facts: dict[str, Any]) -> str:
    if facts["status"] == "running":
        return _at_work(entry.folder)
    if facts["status"] != "done":
        return str(facts["reason"] or "")
    result = run_result(entry)
    identified = result.get("identify")
    if isinstance(identified, dict):
        layers = identified.get("layers") or []
        found = ", ".join(map(str, layers)) if isinstance(layers, list) else ""
        return f"super weight in layer {found}" if found else "no super weight"
    said = [f"{name} {value}" for name, value in _scores(result) if name in ("BLEU", "NLL")]
    trained = result.get("train")
    if not said and isinstance(trained, dict):
        loss, rate = finite(trained.get("last_loss")), finite(trained.get("examples_per_s"))
        said = [f"loss {loss:.3f}"] if loss is not None else []
        said += [f"{rate:.1f} examples/s"] if rate is not None else []
    return " · ".join(said)


def _at_work(folder: Path) -> str:
    try:
        now = snapshot(folder)
        return (
            f"step {now.step} · loss {now.loss:.3f} · {now.examples_per_s:.1f} examples/s"
            if now
            else ""
        )
    except (TypeError, ValueError):
        return ""


def _quiet(folder: Path) -> str:
    """Say for how long a run has written nothing, where that is long."""
    newest_s = 0.0
    for name in ("run.json", "metrics.jsonl", "log.txt"):
        try:
            newest_s = max(newest_s, (folder / name).stat().st_mtime)
        except OSError:
            continue
    quiet_s = time.time() - newest_s
    return duration(quiet_s) if newest_s and quiet_s > QUIET_S else ""


def _progress(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the last step's numbers."""
    last = metrics[-1] if metrics else {}
    formats = {
        "step": ("steps", "{:,.0f}"),
        "rows": ("rows", "{:,.0f}"),
        "examples_per_s": ("examples/s", "{:.1f}"),
        "learning_rate": ("learning rate", "{:.2g}"),
    }
    numbers = []
    for name, (label, form) in formats.items():
        value = finite(last.get(name))
        if value is not None:
            numbers.append((label, form.format(value)))
    elapsed_s = finite(last.get("elapsed_s"))
    if elapsed_s is not None:
        numbers.append(("training", duration(elapsed_s)))
    return numbers


def _scores(result: dict[str, Any]) -> list[tuple[str, str]]:
    evaluated = result.get("eval")
    if not isinstance(evaluated, dict):
        return []
    numbers = []
    for name, digits in SCORES:
        value = finite(evaluated.get(name))
        if value is not None:
            label = name.upper() if name == "nll" else name.replace("_", "-")
            numbers.append((label, f"{value:.{digits}f}"))
    return numbers


def _facts(facts: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what else is known of a run, in words."""
    trained = result.get("train")
    trained = trained if isinstance(trained, dict) else {}
    layers = trained.get("layers")
    n_trainable, memory = (
        finite(trained.get("n_trainable")),
        finite(trained.get("peak_memory_bytes")),
    )
    timings = facts["timings_s"] if isinstance(facts["timings_s"], dict) else {}
    steps = [
        f"{name.replace('_', ' ')} {duration(seconds)}"
        for name, value in timings.items()
        if name != "total" and (seconds := finite(value)) is not None
    ]
    found = [
        ("seed", "" if facts["seed"] is None else str(facts["seed"])),
        ("layers", ", ".join(map(str, layers)) if isinstance(layers, list) else ""),
        ("trained weights", "" if n_trainable is None else f"{n_trainable:,.0f}"),
        ("peak memory", "" if memory is None else f"{memory / 1e9:.2f} GB"),
        ("time", ", ".join(steps)),
    ]
    return [(name, value) for name, value in found if value]
