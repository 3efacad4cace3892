"""The study's folder: the only owner of its format.

    study.yaml   the resolved study             study.json   facts, renewed as the study goes on
    identify/POLICY/     where the layers of `super`, `auto`, ... come from: runs of `identify`
    rates/ARM/RATE/      short runs of `train`; result.json has "heldout": {nll, n_tokens}
    runs/ARM/seed-S/     runs of `train-eval`
    beam/ARM/seed-S/     runs of `eval`         every run folder also holds log.txt

study.json has "status" (running, done, incomplete, cancelled), facts of machine and data, and
"arms": name -> {policy, layers, n_trainable, seeds, control_of, controls, same_as, one_off_s,
open_rates: {layers, rates}, rate: {grid, nll, chosen, at_edge, cost_s, untried}, learning_rate,
reason}, where `same_as` is the arm whose runs are this one's too,
"runs": folder -> {phase, arm, label, status, reason, seconds, load_before}; the load is the
system's, of the last minute.
"""

import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import psutil
from pydantic import ValidationError

from swlora.config import dump_yaml
from swlora.config.yaml_file import read_mapping
from swlora.cores import n_usable_cores
from swlora.errors import UserError
from swlora.files import check_writable, read_json, write_text
from swlora.matrix_peak import processor
from swlora.study.spec import StudySpec
from swlora.work_folder import Status, WorkFolder, facts_of_now, read_facts

BEFORE_TRAINING = ("attach", "prepare")


class StudyFolder(WorkFolder):
    """A study at work in its folder; a context manager that records how it ended.

    Entering it starts the study, or continues the one that is there. Raises UserError where the
    folder holds something else, or another process has entered it. `facts` are empty before: they
    are those of the locked folder.
    """

    work: ClassVar[str] = "study"
    file_name: ClassVar[str] = "study.json"
    status_after_error: ClassVar[Status] = "incomplete"

    def __init__(self, folder: Path, name: str, spec: StudySpec) -> None:
        super().__init__(folder, {})
        self._name, self._spec = name, spec

    @property
    def caches(self) -> Path:
        """The folder of the runs' own caches; empty when nothing is under way."""
        return self.folder / ".cache"

    def record_arm(self, name: str, **facts: Any) -> None:
        """Add facts of an arm to study.json."""
        self.facts["arms"].setdefault(name, {}).update(facts)
        self.record()

    def record_run(self, folder: str, **facts: Any) -> None:
        """Replace what study.json says of a run."""
        self.facts["runs"][folder] = facts
        self.record()

    def read_run_value(self, run: str, name: str, *keys: str) -> Any:
        """Return a value in a JSON file of a run's folder; UserError where it is not there."""
        path = self.folder / run / name
        try:
            value: Any = read_json(path)
            for key in keys:
                value = value[key]
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read; remove its folder to run it again") from error
        return value

    def __enter__(self) -> Self:
        check_folder(self.folder, self._spec)  # before a folder is made: a file may be there
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        try:
            self._start_or_continue()  # another process may have worked here until it was locked
            self._record_start()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _start_or_continue(self) -> None:
        if check_folder(self.folder, self._spec):
            self.facts = read_study(self.folder)
            return
        self.facts = {
            "status": "running",
            "study": self._name,
            **facts_of_now(),
            "machine": machine_facts(),
            "controls": self._spec.controls,
            "baseline": self._spec.baseline,
            "arms": {},
            "runs": {},
        }
        write_text(self.folder / "study.yaml", dump_yaml(self._spec))

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self._note_error(error)
            self._save()


def check_folder(path: Path, spec: StudySpec) -> bool:
    """Say whether `path` holds this study already; False where it is free.

    Raises UserError where it holds something else; a different study is told by what differs.
    """
    check_writable(path, "--output")
    if not (path / "study.json").exists():
        if path.exists() and any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no study; choose another --output")
        return False
    before = read_mapping(path / "study.yaml")
    with suppress(ValidationError):  # settings that an older version did not have: their defaults
        before = StudySpec.model_validate(before).model_dump(mode="json")
    lines = differences(before, spec.model_dump(mode="json"))
    if lines:
        shown = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
        raise UserError(
            f"{path} holds another study ({shown}); choose another --output, or the settings "
            "that it has"
        )
    return True


def read_study(path: Path) -> dict[str, Any]:
    """Read study.json; UserError where the folder is no study."""
    return read_facts(path / StudyFolder.file_name, ("status", "arms", "runs"))


def fit_seconds(timings_s: dict[str, float], *, steps_s: float, held_out_s: float) -> float:
    """Return the seconds of a run from the untrained model to the finished adapter.

    From its run.json: without loading, tokenising and evaluation, be it on the way. A process that
    was killed noted no time of its training there: of it the seconds of its steps count.
    """
    training_s = timings_s.get("train", 0.0) - held_out_s
    before_s = sum(timings_s.get(name, 0.0) for name in BEFORE_TRAINING)
    return before_s + max(training_s, steps_s)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """List the leaves at which two trees differ, as "seeds: [0] there, [0, 1] here"."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in dict.fromkeys((*before, *now)):
            dotted = f"{name}.{key}" if name else str(key)
            lines += differences(before.get(key), now.get(key), dotted)
        return lines
    if name == "arms" and isinstance(before, list) and isinstance(now, list):
        named, as_named = ({arm["name"]: arm for arm in arms} for arms in (before, now))
        in_order = [f"{name}: another order"] if list(named) != list(as_named) else []
        return differences(named, as_named, name) or in_order
    return [] if before == now else [f"{name}: {_brief(before)} there, {_brief(now)} here"]


def machine_facts() -> dict[str, Any]:
    """Return what the timings depend on: processor, cores that may be used, memory, system."""
    return {
        "cpu": processor(),
        "cores": n_usable_cores(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, and nothing that a link in it leads to."""
    shutil.rmtree(path, ignore_errors=True)


def _brief(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
