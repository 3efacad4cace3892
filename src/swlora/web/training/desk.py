"""What the page may do of trainings: look at data, estimate, start, stop, resume, merge, export.

Whatever a request names was listed by the server before: data by `DataFolder`, runs by
`RunFolders`. The name of a new run is checked letter by letter. What is started is the command line
of swlora with a list of arguments, no shell.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from swlora.command_settings import TOKENIZER
from swlora.config import RunSpec
from swlora.deploy.merge_report import MERGE_REPORT, gguf_report
from swlora.errors import UserError
from swlora.files import make_folder
from swlora.locks import is_locked
from swlora.models.anatomy import Anatomy
from swlora.models.builtin import flag_of, is_named
from swlora.models.load import LoadedModel
from swlora.paths import expanded
from swlora.snapshots import has_snapshot
from swlora.study.one_process import LOG
from swlora.web.folders import RunEntry, known_run, public_name
from swlora.web.pages.run_facts import part
from swlora.web.pages.run_files import read_config
from swlora.web.training.data_folder import DataFile, DataFolder
from swlora.web.training.errands import Errand, Errands
from swlora.web.training.made_files import (
    GGUF_TYPES,
    MERGED,
    gguf_path,
    gguf_state,
    merged_path,
    merged_state,
)
from swlora.web.training.wanted import (
    check_run_name,
    data_flags,
    model_flags,
    training_flags,
)
from swlora.web.training.worker import Worker

ROWS_SHOWN = 4
SWLORA = (sys.executable, "-m", "swlora")


@dataclass(frozen=True)
class TrainingDesk:
    """The trainings of one server: of its model, from one folder of data, into one of runs."""

    data: DataFolder
    runs: Path
    worker: Worker
    model: tuple[str, ...] = field(repr=False)  # flags
    tokenizer: tuple[str, ...] = field(repr=False)  # those of them that a look at data takes
    model_name: str = field(repr=False)
    n_layers: int
    errands: Errands = field(default_factory=Errands)

    @classmethod
    def of(cls, spec: RunSpec, loaded: LoadedModel) -> "TrainingDesk | None":
        """Return the desk of a server that was started with --allow-training; else None.

        What may be wrong with its folders was checked before (`allowed.check_allowed`).
        """
        own = spec.serve
        if not own.allow_training or own.data_folder is None:
            return None
        runs = expanded(own.runs).resolve()
        make_folder(runs)
        name = flag_of(loaded.name)
        return cls(
            DataFolder(expanded(own.data_folder), runs),
            runs,
            Worker(runs),
            tuple(model_flags(spec.model, name)),
            tuple(model_flags(spec.model, name, TOKENIZER)),
            name,
            Anatomy(loaded.model).n_layers,
        )

    # Errands

    def look(self, file: DataFile, values: Mapping[str, str]) -> None:
        """Start a look at a file; UserError for columns that cannot be."""
        own = data_flags(file, values)
        command = [*SWLORA, "data", *self.tokenizer, f"--rows={ROWS_SHOWN}", *own]
        self.errands.ask(_key(file, own), lambda result: [*command, f"--json={result}"])

    def look_of(self, file: DataFile, values: Mapping[str, str]) -> Errand | None:
        """Return what became of a look."""
        return self.errands.of(_key(file, data_flags(file, values)))

    def estimate(self, file: DataFile, values: Mapping[str, str]) -> str:
        """Start an estimate of a training and return its key.

        Raises UserError for wrong settings, and beside other work.
        """
        own, folder = training_flags(file, values, self.n_layers), self._new_folder(values)
        command = [*self._train(folder, [*self.model, *own]), "--dry-run"]
        key = _key(file, own)
        # Measured anew: how much is free changes
        self.errands.ask(key, lambda result: [*command, f"--json={result}"], keeps_result=False)
        return key

    # Work

    def start(self, file: DataFile, values: Mapping[str, str]) -> str:
        """Start a training; return the name of its run. UserError where it cannot begin."""
        own, folder = training_flags(file, values, self.n_layers), self._new_folder(values)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"its folder cannot be made: {error.strerror}") from error
        self._begin("train", folder.name, self._train(folder, [*self.model, *own]))
        return folder.name

    def stop(self, run: str, *, at_once: bool) -> None:
        """Stop what is at work in a run; UserError where nothing is."""
        self.worker.stop(run, at_once=at_once)

    def resume(self, entry: RunEntry) -> None:
        """Let a training go on where it stopped; UserError where it cannot."""
        if reason := self.why_not_resumed(entry):
            raise UserError(reason)
        self._begin("train", entry.name, self._train(entry.folder, ["--resume"]))

    def merge(self, entry: RunEntry) -> None:
        """Make a plain model of a run's adapter and its base, in the run's folder.

        One of the adapter as it was before goes, and so do its GGUF files.
        """
        self._check_done(entry)
        folder, merged = entry.folder, merged_path(entry.folder)
        self._check_idle()
        if merged_state(folder) == "old":
            if not (merged / MERGE_REPORT).is_file() or merged.is_symlink():
                raise UserError(f"what lies in {MERGED} was not merged by swlora: remove it")
            with _removing():
                shutil.rmtree(merged)
        for kind in GGUF_TYPES:
            _remove_old_gguf(folder, kind)
        flags = [f"--adapter={folder}", f"--output={merged}"]
        self._begin("merge", entry.name, [*SWLORA, "merge", *self.tokenizer, *flags])

    def export(self, entry: RunEntry, kind: str) -> None:
        """Write the merged model as a GGUF file, in the run's folder, in the place of an old one.

        UserError where the model is not of the adapter as it is now.
        """
        if kind not in GGUF_TYPES:
            raise UserError(f"Type: one of {', '.join(GGUF_TYPES)}")
        self._check_done(entry)
        folder = entry.folder
        if merged_state(folder) != "current":
            raise UserError("merge it first: the file is written of the merged model")
        self._check_idle()
        _remove_old_gguf(folder, kind)
        made = [f"--gguf={gguf_path(folder, kind)}", f"--type={kind}"]
        model = f"--model={merged_path(folder)}"
        self._begin("gguf", entry.name, [*SWLORA, "export", model, *made])

    def why_not_resumed(self, entry: RunEntry) -> str:
        """Say why a run is none that the page can let go on; "" where it is one."""
        facts, folder = known_run(entry.folder), entry.folder
        if facts["command"] != "train" or facts["status"] == "done":
            return "there is nothing to resume"
        if not self.owns(entry):
            return "it does not lie in the folder of runs itself"
        if is_locked(folder):
            return "it is at work"
        if not has_snapshot(folder / "checkpoint"):
            return "it was stopped before its first step; start it again"
        config = read_config(folder)
        data, model = part(config, "data"), part(config, "model")
        if data.get("eval_file") or not self.data.holds(Path(str(data.get("name")))):
            return "its data do not lie in the folder that this server trains from"
        if not is_named(str(model.get("name")), self.model_name):
            return "it is of another model than the one that is served"
        return ""

    def owns(self, entry: RunEntry) -> bool:
        """Say whether a run lies where the page starts its own, directly in the folder of runs."""
        return entry.folder.resolve() == self.runs / entry.name and "/" not in entry.name

    def close(self) -> None:
        """End the errands; what is at work in a run goes on."""
        self.errands.end()

    def _new_folder(self, values: Mapping[str, str]) -> Path:
        """Return the folder of a run that could begin now; UserError for a name that is none.

        Beside other work none begins: what an estimate measures would be that of both.
        """
        name = values.get("name", "").strip()
        check_run_name(name)
        if name == public_name(self.model_name):
            raise UserError(f"the model that is served is called {name}: choose another name")
        self._check_idle()
        folder = self.runs / name
        if os.path.lexists(folder) and not _holds_no_run(folder):
            raise UserError(f"there is a run named {name} already: choose another")
        return folder

    def _begin(self, kind: str, run: str, command: list[str]) -> None:
        self.errands.end()  # an estimate holds memory that is needed now
        self.worker.start(kind, run, command)

    def _check_idle(self) -> None:
        if job := self.worker.now():
            raise UserError(f"{job.run} is at work: one at a time. Stop it, or wait for its end")

    def _check_done(self, entry: RunEntry) -> None:
        facts = known_run(entry.folder)
        if not self.owns(entry) or facts["command"] != "train" or facts["status"] != "done":
            raise UserError("this run is no training that is done")

    def _train(self, folder: Path, flags: list[str]) -> list[str]:
        return [*SWLORA, "train", *flags, f"--output={folder}"]


def _remove_old_gguf(folder: Path, kind: str) -> None:
    if gguf_state(folder, kind) == "old":
        path = gguf_path(folder, kind)
        with _removing():
            path.unlink()
            gguf_report(path).unlink(missing_ok=True)


@contextmanager
def _removing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the old one cannot be removed: {error.strerror or error}") from error


def _holds_no_run(folder: Path) -> bool:
    """Say whether a folder is one in which a training did not begin."""
    is_plain = folder.is_dir() and not folder.is_symlink()
    return is_plain and {path.name for path in folder.iterdir()} <= {LOG}


def _key(file: DataFile, flags: list[str]) -> str:
    text = repr((file.name, file.version, flags))
    return hashlib.sha256(text.encode()).hexdigest()[:24]
