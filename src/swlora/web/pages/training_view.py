"""What the page shows of trainings: data to choose from, rows as the model sees them, work."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from swlora.data.summary import DataSummary, Fact, doubtful_facts, split_facts, step_facts
from swlora.disk_space import size
from swlora.locks import is_locked
from swlora.plural import are, counted
from swlora.preview import DataPreview, ShownRow, Span
from swlora.result_json import from_json
from swlora.web.folders import RUN, RunEntry, known_run, without_folders
from swlora.web.pages.errand_view import ErrandView, outcome
from swlora.web.training.data_folder import DataFile
from swlora.web.training.desk import TrainingDesk
from swlora.web.training.errands import Errand
from swlora.web.training.made_files import (
    GGUF_TYPES,
    MERGED,
    gguf_path,
    gguf_state,
    merged_state,
)
from swlora.web.training.worker import Job, last_line

MAX_CHARACTERS = 1200  # shown of a span
BROKEN = "what it found cannot be read; the server's log and versions may say why"
ENDED = "its process ended without a word; the system may have killed it for want of memory"
AT_WORK = {
    "train": "It trains in a process of its own, which goes on where this server is stopped.",
    "merge": "The adapter is being added to its base's weights; the result is compared with both.",
    "gguf": "The merged model is being written as GGUF, and read back before it gets its name.",
}


MERGED_SAID = {
    "missing": "",
    "old": f"The merged model in the run's folder, {MERGED}, is not of the adapter as it is now: "
    "the training went on after it was made.",
    "current": f"The merged model is in the run's folder, as {MERGED}.",
}


@dataclass(frozen=True)
class DataRow:
    """A line in the list of data."""

    name: str
    size: str
    changed: str


@dataclass(frozen=True)
class Look(ErrandView):
    """A look at data."""

    facts: list[Fact] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    rows: list[ShownRow] = field(default_factory=list)


@dataclass(frozen=True)
class Action:
    """A button: where it leads, what it says; `choices` are values of its field `type`."""

    url: str
    label: str
    is_primary: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunWork:
    """What is done in a run from the page, what can be, and files to take away (url, label)."""

    said: str = ""
    problem: str = ""
    log: str = ""
    actions: list[Action] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)
    is_over: bool = True
    waits_for: str = ""  # the run in which something else is at work

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.said or self.problem or self.actions or self.files)


def data_rows(files: Sequence[DataFile]) -> list[DataRow]:
    """Return the list of data."""
    stamp = "%Y-%m-%d %H:%M"
    return [
        DataRow(file.name, size(file.n_bytes), time.strftime(stamp, time.gmtime(file.changed_s)))
        for file in files
    ]


def look_view(errand: Errand | None) -> Look:
    """Return what is shown of a look at data."""
    state, problem, result = outcome(errand)
    if result is None:
        return Look(state, problem)
    try:
        found = from_json(DataPreview, result)
    except (KeyError, TypeError, ValueError):
        return Look("failed", BROKEN)
    return Look(
        state,
        facts=[
            (name[:1].upper() + name[1:], without_folders(said))
            for name, said in _facts(found.summary)
        ],
        doubts=_doubts(found),
        rows=[replace(row, place=without_folders(row.place)) for row in found.shown],
    )


def shown_text(span: Span) -> str:
    """Return the text of a span with its line ends visible; a long one without its middle."""
    text = span.text
    if (n_left_out := len(text) - MAX_CHARACTERS) > 0:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]} … {counted(n_left_out, 'character')} … {text[-half:]}"
    return text.replace("\n", "↵\n")


def _facts(summary: DataSummary) -> list[Fact]:
    facts = split_facts(summary.train)
    if held_out := summary.held_out:
        prompts = counted(held_out.n_prompts, "prompt")
        facts.append(("held out", f"{counted(held_out.n_rows, 'row')} of {prompts}"))
    if summary.steps:
        facts += step_facts(summary.steps)
    return facts + doubtful_facts(summary)


def _doubts(found: DataPreview) -> list[str]:
    """Say what a training would refuse, and which tick lets it pass."""
    summary = found.summary
    n_bad = sum(summary.bad_rows.values())
    n_cut = sum(split.n_cut for split in (summary.train, summary.held_out) if split)
    doubts = []
    if n_bad:
        rows = counted(n_bad, "row")
        doubts.append(f"{rows} cannot be used: correct that, or tick “Leave out bad rows”.")
    if n_cut:
        doubts.append(
            f"{counted(n_cut, 'row')} {are(n_cut)} longer than the model's context: tick “Shorten "
            "long rows”."
        )
    return doubts


# Work in a run


def run_work(desk: TrainingDesk, name: str, entry: RunEntry | None) -> RunWork | None:
    """Return what the page does, or may do, in a run; None for a run that is none of its own."""
    job, folder = desk.worker.now(), desk.runs / name
    if job is not None and job.run == name:
        has_begun = entry is not None and known_run(entry.folder)["status"] == "running"
        return _at_work(job, folder, has_begun=has_begun)
    last = desk.worker.last()
    if entry is None:
        if last is None or last.run != name:
            return None
        if last.is_stopping:
            return RunWork(problem="The training was stopped before it began.")
        said = _said(folder, last)
        return RunWork(problem=f"The training did not begin: {said or ENDED}")
    facts = known_run(entry.folder)
    if facts["command"] != "train" or not desk.owns(entry) or is_locked(entry.folder):
        return None
    waits_for = job.run if job else ""
    if facts["status"] != "done":
        return _stopped(desk, entry, last, waits_for)
    return _done(entry.folder, name, last, waits_for)


def _at_work(job: Job, folder: Path, *, has_begun: bool) -> RunWork:
    if job.is_stopping:
        said = "It is stopping: a training ends after its present step and leaves a checkpoint."
        action = Action("/train/kill", "End it at once")
        return RunWork(said, actions=[action], is_over=False)
    said, log = AT_WORK.get(job.kind, "Something is at work."), ""
    if job.kind != "train" or not has_begun:
        log = _said(folder, job)
    if job.kind == "train" and not has_begun:
        said = "The training is starting: it loads the model and reads the data."
    return RunWork(said, log=log, actions=[Action("/train/stop", "Stop")], is_over=False)


def _stopped(desk: TrainingDesk, entry: RunEntry, last: Job | None, waits_for: str) -> RunWork:
    if reason := desk.why_not_resumed(entry):
        return RunWork(f"It cannot go on from here: {reason}.", waits_for=waits_for)
    said, problem = "It goes on from its newest checkpoint, as if it had never stopped.", ""
    if last is not None and _was_refused(last, entry):
        why = _said(entry.folder, last)
        said, problem = "", f"It did not go on: {why or ENDED}"
    actions = [Action("/train/resume", "Resume", is_primary=True)]
    return RunWork(said, problem, actions=actions, waits_for=waits_for)


def _was_refused(job: Job, entry: RunEntry) -> bool:
    """Say whether a training was to go on and ended before it had noted so in run.json."""
    if job.run != entry.name or job.kind != "train" or job.is_stopping:
        return False
    return (entry.folder / RUN).stat().st_mtime < job.started_s


def _done(folder: Path, name: str, last: Job | None, waits_for: str) -> RunWork:
    problem, actions, files = "", [], []
    own = last if last is not None and last.run == name else None
    merged = merged_state(folder)
    if (folder / "adapter").is_dir():
        files.append(("/train/adapter", "Adapter, for PEFT (.zip)"))
    there = [kind for kind in GGUF_TYPES if gguf_state(folder, kind) == "current"]
    for kind in there:
        n_bytes = size(gguf_path(folder, kind).stat().st_size)
        files.append((f"/train/gguf/{kind}", f"Merged model as GGUF, {kind} ({n_bytes})"))
    if merged != "current":
        label = "Merge into a model" if merged == "missing" else "Merge again, in its place"
        actions.append(Action("/train/merge", label))
    elif missing := tuple(kind for kind in GGUF_TYPES if kind not in there):
        actions.append(Action("/train/export", "Write as GGUF", choices=missing))
    if own and _has_failed(own, folder):
        said = _said(folder, own)
        problem = f"That did not work: {said or ENDED}"
        if own.is_stopping:
            problem = "It was stopped before its end."
    return RunWork(MERGED_SAID[merged], problem, actions=actions, files=files, waits_for=waits_for)


def _said(folder: Path, job: Job) -> str:
    """Return the last line that a child has written; "" for none."""
    return without_folders(last_line(folder, job.log_from_byte))


def _has_failed(job: Job, folder: Path) -> bool:
    """Say whether a merge or an export ended without what it should have made."""
    if job.kind == "merge":
        return merged_state(folder) == "missing"
    if job.kind != "gguf":
        return False
    made = [gguf_path(folder, kind) for kind in GGUF_TYPES]
    return not any(p.is_file() and p.stat().st_mtime >= job.started_s - 1 for p in made)
