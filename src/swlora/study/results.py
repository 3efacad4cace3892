"""From a study's folder to what it says: results.json, results.md, results.csv and two figures.

A pure function of the folder; it may run at any time, also while the study does. Scores are on the
scales that papers use: BLEU, METEOR and ROUGE-L of 100, NIST and CIDEr unbounded, the loss in nats
a token. Every number of an arm is the mean over its finished seeds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from swlora.config import settings_of
from swlora.direction import higher_is_better
from swlora.errors import UserError
from swlora.evaluation import bootstrap
from swlora.evaluation.bootstrap import Draws
from swlora.evaluation.scales import OF_100, SCALES
from swlora.files import write_json, write_text
from swlora.result_json import as_json, from_json
from swlora.study import statistics as stats
from swlora.study.collect import ArmRecord, ArmRun, StudyRecord, collect
from swlora.study.compared import (
    ArmResult,
    Beam,
    Compared,
    Description,
    Difference,
    FinishedArm,
    Quality,
    RateChoice,
    RunResult,
    Scores,
    Unfinished,
)
from swlora.study.figures import draw_curves, draw_pareto
from swlora.study.published import PUBLISHED
from swlora.study.report import markdown_report
from swlora.study.speed import Pace, loss_curve
from swlora.study.tables import csv_table

# Name here: (name in an evaluation, factor to the published scale)
SCORES = {name.lower(): (name, scale.factor) for name, scale in SCALES.items()}
JUDGED = ("bleu", "nll")


def publish(folder: Path) -> Compared:
    """Summarise the study in `folder`, write the files and return what results.json holds.

    Arms that failed, were cancelled or are missing are listed with the reason. Without a finished
    run there is nothing to draw, and no figure. Raises UserError where the folder is no study, or
    its runs are of different data.
    """
    results = summarise(collect(folder))
    write_json(folder / "results.json", as_json(results))
    write_text(folder / "results.csv", csv_table(results.arms))
    write_text(folder / "results.md", markdown_report(results))
    if results.finished:
        for ending in ("svg", "png"):
            draw_pareto(results, folder / f"pareto.{ending}")
            draw_curves(results, folder / f"curves.{ending}")
    return results


def summarise(study: StudyRecord) -> Compared:
    """Return everything that is published of a study."""
    _check_same_data(study.arms)
    baseline = next((arm for arm in study.arms if arm.name == study.spec.baseline), None)
    yardstick = _Yardstick(baseline, study)
    return Compared(
        study=study.facts.get("study"),
        status=study.facts["status"],
        baseline=study.spec.baseline,
        margin=study.spec.margin.model_dump(),
        controls=study.spec.controls,
        scores=OF_100,
        bootstrap=bootstrap.SETTINGS,
        setting=_setting(study),
        target_nll=yardstick.pace.final_nll if yardstick.pace else None,
        arms=[_arm_result(arm, yardstick) for arm in study.arms],
        unfinished=[
            Unfinished(run.place, run.status, run.reason)
            for arm in study.arms
            if not arm.facts.get("same_as")  # its runs are told as the other one's
            for run in (*arm.runs, *arm.beam)
            if run.status != "done"
        ],
        published=PUBLISHED,
    )


def _setting(study: StudyRecord) -> dict[str, Any]:
    """What all arms share, and where it ran."""
    spec = study.spec.model_dump(mode="json")
    shared = {name: spec[name] for name in ("model", "data", "adapter", "train", "decode", "rate")}
    skipped = ("arms", "runs", "status", "study", "controls", "baseline")
    return {**shared, "facts": {k: v for k, v in study.facts.items() if k not in skipped}}


@dataclass(frozen=True)
class _Seeds:
    """The finished runs of an arm by one way of decoding: scores, and draws of them, by seed."""

    scores: dict[int, Scores]
    draws: dict[str, dict[int, Draws]]

    @classmethod
    def of(cls, runs: Sequence[ArmRun]) -> Self:
        """Take the scores of runs."""
        draws = stats.seed_draws({run.seed: run.segments for run in runs}) if runs else {}
        scaled = {
            name: {seed: factor * values for seed, values in draws[official].items()}
            for name, (official, factor) in SCORES.items()
            if official in draws
        }
        return cls({run.seed: _run_scores(run) for run in runs}, scaled)

    def mean(self, name: str, seeds: Iterable[int] | None = None) -> float | None:
        """Return the mean of a score over seeds, all where none are named."""
        return _mean([self.scores[seed][name] for seed in seeds or self.scores])


@dataclass(frozen=True)
class _Reference:
    """The baseline by one way of decoding, and what may be lost of each score.

    `folders` are its own runs', which are not compared with themselves.
    """

    folders: list[Path]
    seeds: _Seeds
    margins: dict[str, float]


class _Yardstick:
    """What arms are compared with: the baseline's scores and pace."""

    def __init__(self, baseline: ArmRecord | None, study: StudyRecord) -> None:
        self.name = study.spec.baseline
        margins = study.spec.margin.model_dump()
        runs = _done(baseline.runs) if baseline else []
        beam = _done(baseline.beam) if baseline else []
        self.greedy, self.beam = (
            _Reference([run.folder for run in some], _Seeds.of(some), margins)
            for some in (runs, beam)
        )
        self.pace = Pace.of(runs) if runs else None


def _arm_result(arm: ArmRecord, yardstick: _Yardstick) -> ArmResult:
    runs, rate = _done(arm.runs), arm.facts.get("rate")
    known = ArmResult(
        name=arm.name,
        status=arm.status,
        policy=arm.facts.get("policy"),
        control_of=arm.facts.get("control_of"),
        same_as=arm.facts.get("same_as"),
        is_baseline=arm.name == yardstick.name,
        seeds=[run.seed for run in runs],
        planned_seeds=[run.seed for run in arm.runs],
        rate_choice=None if rate is None else from_json(RateChoice, rate),
    )
    if not runs:
        return known
    pace = Pace.of(runs)
    parts = (known, _description(runs), pace.times(), _quality(runs, yardstick.greedy))
    return FinishedArm(
        **{name: value for part in parts for name, value in vars(part).items()},
        english_perplexity=_english(runs, "english_perplexity"),
        english_perplexity_before=_english(runs, "english_perplexity_before"),
        acceleration=pace.against(yardstick.pace) if yardstick.pace else None,
        curve=loss_curve(runs, pace),
        beam=_beam(arm, yardstick),
        runs=[_run_result(run) for run in runs],
    )


def _beam(arm: ArmRecord, yardstick: _Yardstick) -> Beam | None:
    runs = _done(arm.beam)
    if not runs:
        return None
    return Beam(
        **vars(_quality(runs, yardstick.beam)),
        name=arm.name,
        is_baseline=arm.name == yardstick.name,
        seeds=[run.seed for run in runs],
        planned_seeds=[run.seed for run in arm.beam],
        decode=runs[0].spec.decode.model_dump(mode="json"),
    )


def _description(runs: Sequence[ArmRun]) -> Description:
    """What the arm is, the same for all its seeds, and the most memory that one of them took."""
    trained, spec = runs[0].result["train"], runs[0].spec
    memory = [run.result["train"].get("peak_memory_bytes") for run in runs]
    known = [value for value in memory if value is not None]
    return Description(
        method=spec.adapter.method,
        layers=trained["layers"],
        rank=spec.adapter.rank if "rank" in settings_of(spec.adapter.method) else None,
        rank_pattern=trained.get("rank_pattern"),
        targets=spec.adapter.targets,
        epochs=spec.train.epochs or 1,
        learning_rate=spec.train.rate,
        n_prompts=runs[0].result["eval"]["n_prompts"],
        n_trainable=trained["n_trainable"],
        adapter_bytes=trained.get("adapter_bytes"),
        peak_memory_bytes=max(known) if known else None,
    )


def _quality(runs: Sequence[ArmRun], reference: _Reference) -> Quality:
    """Scores with intervals and spread, and what they say against the baseline."""
    own = _Seeds.of(runs)
    means = Scores(**{name: own.mean(name) for name in SCORES})
    is_reference = runs[0].folder in reference.folders
    return Quality(
        scores=means,
        intervals={
            name: list(bootstrap.interval(stats.over_seeds(draws)))
            for name, draws in own.draws.items()
        },
        spread={
            n: stats.spread([scores.measured(n) for scores in own.scores.values()])
            for n in SCORES
            if means[n] is not None
        },
        against_baseline={
            name: _against(name, own, reference)
            for name in JUDGED
            if name in reference.seeds.draws and name in own.draws and not is_reference
        },
    )


def _against(name: str, own: _Seeds, reference: _Reference) -> Difference:
    base = reference.seeds
    common = sorted(own.scores.keys() & base.scores.keys())
    mean, of_baseline = own.mean(name, common), base.mean(name, common)
    assert mean is not None and of_baseline is not None, name  # a score with draws is measured
    found = bootstrap.interval(stats.differences(own.draws[name], base.draws[name]))
    judged = stats.verdict(found, reference.margins[name], larger_is_better=higher_is_better(name))
    return Difference(mean - of_baseline, list(found), judged, common)


def _run_result(run: ArmRun) -> RunResult:
    rate = stats.steady_rate(run.metrics)
    return RunResult(run.seed, run.train_s, run.total_s, rate, _run_scores(run))


def _run_scores(run: ArmRun) -> Scores:
    evaluated = run.result["eval"]
    values = {"NLL": evaluated["nll"], **evaluated}
    raw = {name: values.get(official) for name, (official, _) in SCORES.items()}
    return Scores(**{n: None if v is None else SCORES[n][1] * v for n, v in raw.items()})


def _english(runs: Sequence[ArmRun], name: str) -> float | None:
    return _mean([run.result["eval"].get(name) for run in runs])


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, None where a value is missing: half a mean would be another number."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _done(runs: Sequence[ArmRun]) -> list[ArmRun]:
    return [run for run in runs if run.status == "done"]


def _check_same_data(arms: Sequence[ArmRecord]) -> None:
    hashes = {
        run.facts.get("data_sha256") for arm in arms for run in [*_done(arm.runs), *_done(arm.beam)]
    }
    if len(hashes) > 1:
        raise UserError(
            "the runs of this study were made with different data; start it again in a new folder"
        )
