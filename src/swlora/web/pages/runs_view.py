"""What the pages of the runs show: a line for every run, and one run with its loss curve.

A run folder is read as it is at that moment: half written, torn, or of another version, it gives
less on the page and never an error.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swlora.errors import UserError
from swlora.evaluation.loss_curve import Point, smoothed
from swlora.metrics_file import METRICS
from swlora.progress import duration
from swlora.runs import Run
from swlora.study.live import snapshot
from swlora.web.folders import (
    METRICS_FILES,
    RUN,
    RunEntry,
    known_run,
    reading,
    run_figures,
    run_result,
)
from swlora.web.pages.charts import Chart, Series, finite, line_chart
from swlora.web.pages.data_view import data_facts
from swlora.web.pages.identified_view import Identified, identified_view
from swlora.web.pages.run_facts import Fact, is_of_sample, part, plain, run_facts, scores
from swlora.web.pages.run_files import Prediction, Sampled, read_predictions, sampled_prompts
from swlora.work_folder import KILLED, KILLED_SAID, failure_of, present_status

MAX_SHOWN = 200
QUIET_S = 600.0  # a training that says nothing for that long may have been killed
LOOKS = {
    "done": "good",
    "running": "busy",
    "failed": "bad",
    "cancelled": "bad",
    "incomplete": "bad",
    KILLED: "bad",
}
NEVER_STARTED = ("failed", "cancelled")
LEFT_BY_WORK = (METRICS, "result.json", "adapter", "checkpoint")
HEADLINE_SCORES = ("BLEU", "NLL, nats a token")


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
    """One run: its row, numbers (name, value), pictures, what it was and what it generated."""

    row: RunRow
    is_of_sample: bool
    numbers: list[Fact]
    scores: list[Fact]
    chart: Chart | None
    identified: Identified | None
    figures: list[str]
    facts: list[Fact]
    data: list[Fact]
    samples: list[Sampled]
    predictions: list[Prediction]
    has_adapter: bool
    refusal: str  # why its adapter cannot be served


@dataclass(frozen=True)
class RunList:
    """Runs, the newest first; how many older ones there are, and how many that never started.

    `unreadable` are the names of those that cannot be shown.
    """

    rows: list[RunRow]
    n_older: int
    n_idle: int
    unreadable: list[str]


def run_list(entries: Iterable[RunEntry], *, shows_all: bool = False) -> RunList:
    """Return the runs; those that never started are counted, and shown with `shows_all` only."""
    found, unreadable, n_idle = [], [], 0
    for entry in entries:
        try:
            with reading(entry.name):
                facts = known_run(entry.folder)
                is_idle = _never_started(entry, facts)
        except UserError:  # it is just being removed
            continue
        n_idle += is_idle
        if shows_all or not is_idle:
            found.append((entry, facts))
    found.sort(key=lambda pair: str(pair[1].get("started_at")), reverse=True)
    rows = []
    for entry, facts in found[:MAX_SHOWN]:
        try:
            with reading(entry.name):
                rows.append(_row(entry, facts))
        except UserError:
            unreadable.append(entry.name)
    n_older = max(0, len(found) - MAX_SHOWN)
    return RunList(rows, n_older, n_idle, unreadable)


def run_view(
    entry: RunEntry, adapters: Iterable[str] = (), not_served: Mapping[str, str] | None = None
) -> RunView:
    """Return one run; UserError where it cannot be read just now.

    `adapters` are served, those of `not_served` are not, with the reason.
    """
    with reading(entry.name):
        return _run_view(entry, adapters, not_served or {})


def _run_view(entry: RunEntry, adapters: Iterable[str], not_served: Mapping[str, str]) -> RunView:
    facts, result = known_run(entry.folder), run_result(entry)
    metrics = METRICS_FILES.of(entry.folder).shown()
    n_steps = finite(metrics[-1].get("step")) if metrics else None
    identified = identified_view(part(result, "identify"))
    chart = loss_chart(metrics)
    drawn = {"loss.png"} if chart else set()  # by the page itself
    if identified:
        drawn |= identified.figures
    return RunView(
        row=_row(entry, facts),
        is_of_sample=is_of_sample(facts, result),
        numbers=_progress(metrics),
        scores=scores(result),
        chart=chart,
        identified=identified,
        figures=[name for name in run_figures(entry) if name not in drawn],
        facts=run_facts(entry.folder, facts, result, n_steps),
        data=data_facts(result),
        samples=sampled_prompts(entry.folder),
        predictions=read_predictions(entry.folder),
        has_adapter=entry.name in adapters,
        refusal=not_served.get(entry.name, ""),
    )


def loss_chart(metrics: Sequence[dict[str, Any]]) -> Chart | None:
    """Return the loss of every step, its smoothed course, and that on held-out rows."""
    steps = _points(metrics, lambda row: row["loss"])
    held_out = _points(metrics, lambda row: row["eval_nll"])
    if not steps:
        return None
    course = smoothed(steps)
    low = min(y for _, y in [*steps, *held_out])
    high = max(y for _, y in [*course, *held_out])  # single steps may rise above the picture
    said = f"From {course[0][1]:.3f} at step {course[0][0]:.0f} to {course[-1][1]:.3f} at step "
    said += f"{course[-1][0]:.0f}."
    if held_out:
        best = min(held_out, key=lambda point: point[1])
        said += f" On held-out rows at last {held_out[-1][1]:.3f}"
        said += f", at best {best[1]:.3f} at step {best[0]:.0f}." if best != held_out[-1] else "."
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


def _never_started(entry: RunEntry, facts: dict[str, Any]) -> bool:
    """Say whether a run ended before it had done anything."""
    if facts["status"] not in NEVER_STARTED:
        return False
    return not any((entry.folder / name).exists() for name in LEFT_BY_WORK)


def _row(entry: RunEntry, facts: dict[str, Any]) -> RunRow:
    status = present_status(entry.folder / RUN, facts)
    timings = facts.get("timings_s")
    total_s = finite(timings.get("total")) if isinstance(timings, dict) else None
    is_running = status == "running"
    return RunRow(
        name=entry.name,
        command=str(facts["command"]),
        status=status,
        look=status_look(status),
        started=shown_time(facts.get("started_at")),
        took="" if total_s is None or is_running else duration(total_s),
        headline=_headline(entry, facts, status),
        quiet=_quiet(entry.folder) if is_running else "",
    )


def _headline(entry: RunEntry, facts: dict[str, Any], status: str) -> str:
    if status == KILLED:
        return KILLED_SAID
    if status == "running":
        return _at_work(entry.folder)
    if status != "done":
        failure = failure_of(facts)
        return plain(failure.message) if failure else ""
    result = run_result(entry)
    identified = result.get("identify")
    if isinstance(identified, dict):
        layers = identified.get("layers") or []
        found = ", ".join(map(str, layers)) if isinstance(layers, list) else ""
        return f"super weight in layer {found}" if found else "no super weight"
    said = [f"{n.split(',')[0]} {value}" for n, value in scores(result) if n in HEADLINE_SCORES]
    trained = result.get("train")
    if not said and isinstance(trained, dict):
        loss, rate = finite(trained.get("last_loss")), finite(trained.get("examples_per_s"))
        said = [f"loss {loss:.3f}"] if loss is not None else []
        said += [f"{rate:.1f} examples/s"] if rate is not None else []
    sample = ["made-up sample data"] if said and is_of_sample(facts, result) else []
    return " · ".join([*said, *sample])


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
    for name in (Run.file_name, METRICS, "log.txt"):
        try:
            newest_s = max(newest_s, (folder / name).stat().st_mtime)
        except OSError:
            continue
    quiet_s = time.time() - newest_s
    return duration(quiet_s) if newest_s and quiet_s > QUIET_S else ""


def _progress(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the last step's numbers, and the last held-out loss."""
    last = metrics[-1] if metrics else {}
    formats = {
        "step": ("steps", "{:,.0f}"),
        "rows": ("rows", "{:,.0f}"),
        "examples_per_s": ("examples/s", "{:.1f}"),
        "nodes_per_s": ("nodes/s", "{:,.0f}"),
        "peak_share": ("of peak", "{:.0%}"),
        "busy_share": ("cores used by others", "{:.0%}"),
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
    for label, name in (("loss", "loss"), ("held-out loss", "eval_nll")):
        measured = _points(metrics, lambda row, name=name: row[name])
        if measured:
            numbers.append((label, f"{measured[-1][1]:.3f}"))
    return numbers
