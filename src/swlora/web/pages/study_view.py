"""What the page of a study shows: where every arm stands, and the tables and pictures made of it.

The tables are those of results.json, which `swlora compare` writes when it ends; where a study
stands is read from study.json at any time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from swlora.bounded_read import UnreadableError, read_json_object
from swlora.errors import UserError
from swlora.layer_policy import EN_DASH, layer_ranges
from swlora.plural import counted
from swlora.progress import duration
from swlora.study import tables
from swlora.study.compared import FinishedArm, read_finished
from swlora.study.tables import Column
from swlora.web.folders import (
    RUN,
    STUDY,
    RunEntry,
    known_run,
    known_study,
    reading,
    run_figures,
)
from swlora.web.pages.charts import finite
from swlora.web.pages.runs_view import shown_time, status_look
from swlora.work_folder import KILLED, present_status

PHASES = {"identify": "search", "rates": "", "runs": "", "beam": "beam search"}
FIGURES = (
    (
        "pareto.svg",
        "Time against quality",
        "Seconds to the end against BLEU and against the loss, an arm a point; better is up and to "
        "the left. The numbers are in the tables.",
    ),
    ("curves.svg", "Loss against seconds", "The held-out loss of every arm against seconds."),
)
ODD = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


@dataclass(frozen=True)
class StudyRow:
    """A study in the list."""

    name: str
    status: str
    look: str
    started: str
    headline: str


@dataclass(frozen=True)
class RunCell:
    """A run of an arm: where it is, and how it stands."""

    run: str
    label: str
    status: str
    look: str
    said: str


@dataclass(frozen=True)
class ArmRow:
    """An arm and its runs."""

    name: str
    layers: str
    runs: list[RunCell]


@dataclass(frozen=True)
class Table:
    """A table of results."""

    title: str
    head: list[str]
    rows: list[list[str]]
    baseline: int | None  # the row of the arm that the others are compared with


@dataclass(frozen=True)
class StudyView:
    """A study as it stands. `current` is the run at work, by its name."""

    row: StudyRow
    about: str
    reason: str
    arms: list[ArmRow]
    current: str | None


def study_rows(entries: Iterable[RunEntry]) -> list[StudyRow]:
    """Return the studies that can be shown, the newest first."""
    found = []
    for entry in entries:
        try:
            with reading(entry.name):
                facts = known_study(entry.folder)
                found.append((str(facts.get("started_at")), _row(entry, facts)))
        except UserError:
            continue
    return [row for _, row in sorted(found, key=lambda pair: pair[0], reverse=True)]


def study_view(entry: RunEntry) -> StudyView:
    """Return where a study stands; UserError where it cannot be read just now."""
    with reading(entry.name):
        return _study_view(entry, known_study(entry.folder))


def _study_view(entry: RunEntry, facts: Mapping[str, Any]) -> StudyView:
    runs = _runs(entry, facts)
    current = next((p for p, told in runs.items() if _said(told, "status") == "running"), None)
    machine = _mapping(facts.get("machine"))
    about = [_said(facts, "data_source"), _said(machine, "cpu")]
    return StudyView(
        row=_row(entry, facts),
        about=" · ".join(said for said in about if said),
        reason=_said(facts, "reason"),
        arms=_arms(entry, _mapping(facts["arms"]), runs),
        current=entry.inner(current) if current else None,
    )


def study_tables(entry: RunEntry) -> list[Table]:
    """Return the tables of results.json; none where it is not there or of another version."""
    try:
        results = read_json_object(entry.folder / "results.json", follow_links=False)
        arms = read_finished(results)
    except (*ODD, UnreadableError):
        return []
    wanted: list[tuple[str, Callable[[], Sequence[Column[FinishedArm]]]]] = [
        ("Quality, against the baseline", lambda: tables.verdict_columns(["bleu", "nll"])),
        ("Time", tables.time_columns),
        ("All scores", tables.score_columns),
        ("What was trained", tables.arm_columns),
    ]
    found = [_table(title, columns(), arms) for title, columns in wanted] if arms else []
    return [table for table in found if table is not None]


def study_figures(entry: RunEntry) -> list[tuple[str, str, str]]:
    """Return (file, title, description) of the pictures that are there."""
    there = run_figures(entry)
    return [figure for figure in FIGURES if figure[0] in there]


def _runs(entry: RunEntry, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what study.json says of the runs; of a study that was killed, what is true of them."""
    runs = _mapping(facts["runs"])
    if present_status(entry.folder / STUDY, facts) != KILLED:
        return runs
    return {place: _as_it_is(entry, place, told) for place, told in runs.items()}


def _as_it_is(entry: RunEntry, place: str, told: Any) -> Any:
    """Return what is told of a run, which may go on though its study was killed."""
    if _said(told, "status") != "running":
        return told
    study, folder = entry.folder.resolve(), (entry.folder / place).resolve()
    status = KILLED
    if folder.is_relative_to(study) and folder.is_dir():
        with suppress(UserError):  # it had not begun
            status = present_status(folder / RUN, known_run(folder))
    return told | {"status": status}


def _row(entry: RunEntry, facts: Mapping[str, Any]) -> StudyRow:
    runs = _runs(entry, facts)
    states = Counter(_said(told, "status") for told in runs.values())
    n_done = states.pop("done", 0)
    others = [f"{n} {state}" for state, n in sorted(states.items()) if state]
    arms = _mapping(facts["arms"])
    said = [counted(len(arms), "arm"), f"{counted(n_done, 'run')} done", *others]
    status = present_status(entry.folder / STUDY, facts)
    return StudyRow(
        entry.name,
        status,
        status_look(status),
        shown_time(facts.get("started_at")),
        ", ".join(said),
    )


def _arms(study: RunEntry, arms: Mapping[str, Any], runs: Mapping[str, Any]) -> list[ArmRow]:
    names = dict.fromkeys([*arms, *(_said(told, "arm") for told in runs.values())])
    rows = []
    for name in names:
        facts = _mapping(arms.get(name))
        cells = [_cell(study, p, told) for p, told in runs.items() if _said(told, "arm") == name]
        rows.append(ArmRow(name, _layers(facts), cells))
    return rows


def _layers(facts: Mapping[str, Any]) -> str:
    try:
        return layer_ranges(facts["layers"], EN_DASH)
    except ODD:
        return _said(facts, "policy")


def _cell(study: RunEntry, place: str, told: Any) -> RunCell:
    status, seconds = _said(told, "status"), finite(_mapping(told).get("seconds"))
    phase = PHASES.get(_said(told, "phase"), _said(told, "phase"))
    label = " ".join(dict.fromkeys([phase, _said(told, "label")])).strip() or place
    took = duration(seconds) if seconds is not None else ""
    said = _said(told, "reason") or took
    return RunCell(study.inner(place), label, status, status_look(status), said)


def _table(
    title: str, columns: Sequence[Column[FinishedArm]], arms: Sequence[FinishedArm]
) -> Table | None:
    """Return a table; None where an arm lacks what this version writes."""
    _, *rest = columns  # the first is the arm's name, marked for Markdown
    try:
        rows = [[arm.name, *(cell(arm) for _, cell in rest)] for arm in arms]
    except ODD:
        return None
    baseline = next((k for k, arm in enumerate(arms) if arm.is_baseline), None)
    return Table(title, ["arm", *(name for name, _ in rest)], rows, baseline)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _said(facts: Any, name: str) -> str:
    value = _mapping(facts).get(name)
    return "" if value is None else str(value)
