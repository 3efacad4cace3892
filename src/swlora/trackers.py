"""Reports of a training to TensorBoard, trackio, Weights & Biases or MLflow, through Accelerate.

A tracker that fails is told of once and left out from then on: what watches a training, and what
lies on the other side of a network, must not end it. Nor must a question, such as that of W&B for a
key, on a terminal that nobody sits at.
"""

import hashlib
import importlib.util
import io
import math
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from swlora.config import TrainSpec
from swlora.errors import UserError
from swlora.result_json import as_json
from swlora.run_record import RunRecord

EXTRA = "track"  # of the package: what it installs
IN_EXTRA = ("tensorboard", "trackio")
OUR_PROJECT = "swlora"
MAX_PROJECT = 60  # characters of a name that a tracker makes a file of
RESERVED = "registry-"  # beginnings of names that trackio keeps for itself
LONGEST_TEXT = 2000  # characters of a setting, or of a sample
_GROUPS = {"loss": "train/loss", "eval_nll": "eval/loss"}
_LEFT_OUT = ("step", "sum_nats", "n_tokens", "eval_sum_nats", "eval_n_tokens", "eval_s")
Values = Mapping[str, Any]


def missing_trackers(names: Sequence[str]) -> list[str]:
    """Say of each tracker that is not installed how it is; nothing is imported."""
    return [
        f"--report-to {name} needs a package that is not installed: pip install {_package(name)}"
        for name in names
        if importlib.util.find_spec(name) is None
    ]


def check_trackers(spec: TrainSpec, *, has_folder: bool) -> None:
    """Raise UserError where a run cannot report as asked: that shows before a model is loaded."""
    if missing := missing_trackers(spec.report_to):
        raise UserError("; ".join(missing))
    if "tensorboard" in spec.report_to and not has_folder:
        raise UserError(
            "tensorboard's files lie in the run folder, and this run has none: give output"
        )


def _package(name: str) -> str:
    return f"'swlora[{EXTRA}]'" if name in IN_EXTRA else name


def project_name(name: str) -> str:
    """Return a project's name in letters, digits and hyphens, with a hash of it where that is new.

    trackio drops other characters from the name of its database, so that two projects share one.
    """
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:MAX_PROJECT]
    if plain.lower().startswith(RESERVED):
        plain = f"project-{plain}"
    if plain == name:
        return name
    return f"{plain or 'project'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class Trackers:
    """The trackers of a run, which begin with its first report; those of a resumed run go on.

    `settings` are its settings by their dotted names, `say` tells a person. Reports of steps that
    were sent before a kill, and are done again after it, are not sent twice.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: RunRecord,
        project: str | None,
        settings: Values,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._settings, self._say = run, settings, say
        self._project = project or OUR_PROJECT
        self._waiting, self._working = list(names), dict[str, Any]()
        reported = run.metrics() if names else []
        self._step = self._n_sent = reported[-1]["step"] if reported else 0
        self._known: dict[str, str] = dict(run.facts.get("tracked", {}))
        self._known.setdefault("id", uuid.uuid4().hex[:8])

    def report(self, report: Values) -> None:
        """Send the report of a step, as metrics.jsonl has it."""
        step = self._step = int(report["step"])
        named = {_GROUPS.get(n, f"train/{n}"): v for n, v in report.items() if n not in _LEFT_OUT}
        self._log(numbers(named), step, only_new=True)

    def texts(self, texts: Sequence[str], step: int) -> None:
        """Send texts that were generated after a step; MLflow takes numbers alone."""
        named = {f"samples/{i}": text[:LONGEST_TEXT] for i, text in enumerate(texts, start=1)}
        self._log(named, step, leave_out=("mlflow",), only_new=True)

    def result(self, result: Any) -> None:
        """Send the numbers of what came out in the end."""
        if self._waiting or self._working:
            found = as_json(result)
            named = numbers(found) | numbers(found.get("own", {}))
            self._log({f"final/{name}": value for name, value in named.items()}, self._step)

    def close(self) -> None:
        """End what was begun, so that everything is written."""
        for name, tracker in list(self._working.items()):
            with self._told(name):
                _finish(name, tracker)
        self._working.clear()
        self._waiting.clear()

    def _log(
        self, values: Values, step: int, leave_out: Iterable[str] = (), *, only_new: bool = False
    ) -> None:
        for name in list(self._waiting):
            self._waiting.remove(name)
            with self._told(name):
                # A result alone is of a training that went before: its last step stays.
                self._working[name] = self._begun(name, step if only_new else step + 1)
        for name, tracker in list(self._working.items()):
            was_sent = only_new and step <= self._n_sent and name != "tensorboard"
            if values and name not in leave_out and not was_sent:
                with self._told(name):
                    tracker.log(dict(values), step=step)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Tell of a failure of the body, after which the tracker is left out.

        What trackers print is no result of the command, and would tear its bars.
        """
        try:
            with redirect_stdout(io.StringIO()), _nobody_to_ask(), _state_for_logs():
                yield
        except Exception as error:  # of many libraries
            self._working.pop(name, None)
            detail = " ".join(str(error).split())[:200] or type(error).__name__
            self._say(f"no more reports to {name}: {detail}; the training goes on")

    def _begun(self, name: str, step: int) -> Any:
        """Return a tracker of Accelerate's that has begun, or goes on before `step`.

        What it has of that step and later ones is of a process that was killed, and goes.
        """
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker = LOGGER_TYPE_TO_CLASS[name](*self._place(name), **self._how(name, step))
        tracker.start()
        if name not in self._known and name != "trackio":  # which has them from its beginning on
            tracker.store_init_configuration(_plain(self._settings))
        own_id = tracker.tracker.info.run_id if name == "mlflow" else self.run_name
        if self._known.get(name) != own_id:
            self._known[name] = own_id
            self._run.record(tracked=dict(self._known))
        return tracker

    @property
    def run_name(self) -> str:
        """What the run is called: as its folder, and what makes it another one than its like."""
        folder = self._run.folder
        return f"{folder.resolve().name if folder else 'run'}-{self._known['id']}"

    def _place(self, name: str) -> tuple[str, ...]:
        """Return the arguments of a tracker's class that say where its reports go."""
        if name == "tensorboard":
            return "tensorboard", str(self._run.folder)
        return (project_name(self._project) if name == "trackio" else self._project,)

    def _how(self, name: str, step: int) -> dict[str, Any]:
        """Return what the run is called there, and how it goes on where it was begun before."""
        before = self._known.get(name)
        match name:
            case "tensorboard":
                return {"purge_step": step} if before else {}
            case "trackio":
                settings = _plain(self._settings)  # Accelerate's way adds one that is none
                own = {"name": self.run_name, "resume": "allow", "embed": False}
                return {**own, "config": settings}
            case "wandb":
                folder = {"dir": str(self._run.folder)} if self._run.folder else {}
                own = {"id": self._known["id"], "name": self.run_name, "resume": "allow"}
                return {**own, **folder}
        return {"run_id": before} if before else {"run_name": self.run_name}


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Let what asks a person see no terminal, which it takes for a refusal instead of waiting."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before


@contextmanager
def _state_for_logs() -> Iterator[None]:
    """Have the state that the logs of Accelerate's classes want, and leave none that was not there.

    It is the whole process's: an Accelerator that somebody makes later would take its device.
    """
    from accelerate.state import PartialState

    was_there = bool(PartialState._shared_state)
    PartialState(cpu=True)
    try:
        yield
    finally:
        if not was_there:
            PartialState._reset_state()


def _finish(name: str, tracker: Any) -> None:
    if name == "trackio":
        import trackio  # Accelerate leaves its run the current one, to be ended once more at exit

        trackio.finish()
    else:
        tracker.finish()


def numbers(values: Values) -> dict[str, float]:
    """Return the finite numbers among values."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _plain(settings: Values) -> dict[str, Any]:
    """Return settings as hyperparameters: numbers, truth values and texts; none that is unset."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if value is not None:
            plain[name] = value[:LONGEST_TEXT] if isinstance(value, str) else value
    return plain
