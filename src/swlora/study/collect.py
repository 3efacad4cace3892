"""Reads what a study left in its folder: every run of every arm, also those that came to nothing.

    total_s = from the untrained model to the finished adapter, without loading and evaluation
              - held-out losses measured on the way
              + what finding the arm's layers cost

so a total is what it takes to train this arm alone, every one-off cost included. An arm that found
the layers of another one has the runs of that, and its own one-off cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from swlora.config import RunSpec, load_spec
from swlora.config.yaml_file import read_mapping
from swlora.errors import UserError
from swlora.evaluation.segments import Segments
from swlora.files import read_json
from swlora.metrics_file import read_metrics
from swlora.runs import read_run
from swlora.settings import problem_lines
from swlora.study.folder import fit_seconds, read_study
from swlora.study.spec import StudySpec

UNFINISHED_STATUSES = ("running", "failed", "cancelled", "missing")
NO_LAYERS = "no layers"  # the search for the arm's layers found none, which is an answer


@dataclass(frozen=True)
class ArmRun:
    """One run of an arm, at `place` in the study.

    `told` is what study.json says of it, `one_off_s` what finding the arm's layers cost.
    """

    seed: int
    place: str
    folder: Path
    told: Mapping[str, Any]
    one_off_s: float = 0.0

    @cached_property
    def facts(self) -> dict[str, Any]:
        """run.json, or {} where the run was never started or left nothing readable."""
        try:
            return read_run(self.folder)
        except UserError:
            return {}

    @property
    def status(self) -> str:
        """done, failed, cancelled, running (or killed while it was), missing, or no layers."""
        found = self.told.get("status") or self.facts.get("status") or "missing"
        return "failed" if found == "done" and self.problem else str(found)

    @property
    def reason(self) -> str | None:
        """Why the run is not done, as far as it is known."""
        if self.status == "done":
            return None
        known = self.problem or self.told.get("reason") or self.facts.get("reason")
        return known or ("not started" if self.status == "missing" else None)

    @cached_property
    def problem(self) -> str | None:
        """What is missing from a run that says it is done."""
        if self.told.get("status", self.facts.get("status")) != "done":
            return None
        try:
            self.result["eval"]["nll"], self.facts["timings_s"]["total"]
            self.spec.seed, self.segments.sum_nats, self.metrics  # noqa: B018
        except (UserError, KeyError, TypeError) as error:
            return f"it is done but incomplete: {error}"
        return None

    @cached_property
    def spec(self) -> RunSpec:
        """The run's configuration."""
        return load_spec(self.folder / "config.yaml", {})

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json; UserError where it is absent or damaged."""
        return read_json(self.folder / "result.json")

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder)

    @cached_property
    def segments(self) -> Segments:
        """What the evaluation measured of each prompt."""
        return Segments.read(self.folder)

    @property
    def train_s(self) -> float:
        """Seconds in training steps."""
        return float(self.result["train"]["train_s"])

    @property
    def total_s(self) -> float:
        """Seconds from the untrained model to the finished adapter, one-off costs included."""
        held_out_s = sum(m.get("eval_s", 0.0) for m in self.metrics)
        timings_s = self.facts["timings_s"]
        fit_s = fit_seconds(timings_s, steps_s=self.train_s, held_out_s=held_out_s)
        return float(fit_s + self.one_off_s)


@dataclass(frozen=True)
class ArmRecord:
    """One arm: its runs by seed, those with beam search, and the facts in study.json."""

    name: str
    facts: Mapping[str, Any]
    runs: tuple[ArmRun, ...]
    beam: tuple[ArmRun, ...]

    @property
    def status(self) -> str:
        """The status of its runs; "partly done" where only some are done."""
        found = {run.status for run in self.runs} or {"missing"}
        if "done" in found:
            return "done" if found == {"done"} else "partly done"
        return next(s for s in (*UNFINISHED_STATUSES, NO_LAYERS) if s in found)


@dataclass(frozen=True)
class StudyRecord:
    """A study as it stands."""

    spec: StudySpec
    facts: Mapping[str, Any]
    arms: tuple[ArmRecord, ...]


def collect(folder: Path) -> StudyRecord:
    """Read the study in `folder`; UserError where there is none or its files are damaged."""
    facts = read_study(folder)
    try:
        spec = StudySpec.model_validate(read_mapping(folder / "study.yaml"))
    except ValidationError as error:
        problems = "; ".join(problem_lines(error, StudySpec))
        raise UserError(f"in {folder / 'study.yaml'}: {problems}") from error
    names = _with_controls([arm.name for arm in spec.arms], facts["arms"])
    return StudyRecord(spec, facts, tuple(_arm(folder, spec, facts, name) for name in names))


def _with_controls(names: list[str], told: Mapping[str, Any]) -> list[str]:
    """Put behind each arm of the file its controls, and last what else the study knows."""
    ordered = []
    for name in names:
        ordered += [name, *(c for c, arm in told.items() if arm.get("control_of") == name)]
    return list(dict.fromkeys([*ordered, *told]))


def _arm(folder: Path, spec: StudySpec, facts: Mapping[str, Any], name: str) -> ArmRecord:
    own = facts["arms"].get(name, {})
    seeds = own.get("seeds") or next(
        (arm.seeds for arm in spec.arms if arm.name == name and arm.seeds), spec.seeds
    )

    def run(phase: str, seed: int) -> ArmRun:
        place = f"{phase}/{own.get('same_as') or name}/seed-{seed}"
        status = NO_LAYERS if own.get("layers") == [] else None
        told = facts["runs"].get(place, {"status": status, "reason": own.get("reason")})
        return ArmRun(seed, place, folder / place, told, own.get("one_off_s") or 0.0)

    beam_seeds = [s for s in spec.beam.seeds or seeds if s in seeds]
    beam = [run("beam", seed) for seed in beam_seeds] if name in spec.beam.arms else []
    return ArmRecord(name, own, tuple(run("runs", seed) for seed in seeds), tuple(beam))
