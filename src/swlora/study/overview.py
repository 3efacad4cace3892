"""What a study would do, before it does anything: arms, layers, trained weights, steps, runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from swlora.config import settings_of
from swlora.layer_policy import EN_DASH, layer_ranges
from swlora.study.arms import Arm, arms_of, expected_controls
from swlora.study.check import Checked
from swlora.study.compared import Compared, ComparedModels
from swlora.study.spec import rate_name
from swlora.study.tables import markdown_table, verdict_columns


@dataclass(frozen=True)
class PlannedArm:
    """An arm as far as it is known before anything ran; None is not known yet."""

    name: str
    method: str
    policy: str
    layers: list[int] | None
    control_of: str | None
    rank: int | None
    epochs: int
    n_trainable: int | None
    n_steps: int | None
    rates: list[float] | None
    seeds: list[int]


@dataclass(frozen=True)
class Plan:
    """What a study would do; `unchecked` says what was not at hand to be looked at."""

    study: str
    model: str
    data: str
    facts: dict[str, Any]
    n_rows: dict[str, int]
    baseline: str
    controls: bool
    margin: dict[str, float]
    arms: list[PlannedArm]
    n_short_runs: int
    n_further_rates: int  # of an arm, beyond the edge of its grid, at most
    n_runs: int
    n_beam_runs: int
    unchecked: list[str]


@dataclass(frozen=True)
class Plans:
    """The plans of a file's studies, one for each of its models."""

    studies: list[Plan]


def arms_before(checked: Checked) -> list[Arm]:
    """Return all arms as far as they are known before anything ran, controls included."""
    spec, arms = checked.spec, arms_of(checked.spec, checked.n_layers)
    return [each for arm in arms for each in (arm, *expected_controls(arm, spec))]


def plan_of(name: str, checked: Checked, wanted: list[str]) -> Plan:
    """Return the plan of a study."""
    spec = checked.spec
    arms = [arm for arm in arms_before(checked) if arm.name in wanted]
    n_short = sum(len(arm.rates) for arm in arms if len(arm.rates) > 1)
    n_beam = sum(
        len([s for s in spec.beam.seeds or arm.seeds if s in arm.seeds])
        for arm in arms
        if arm.name in spec.beam.arms
    )
    return Plan(
        study=name,
        model=spec.model.name,
        data=spec.data.name,
        facts=checked.facts,
        n_rows=checked.n_rows,
        baseline=spec.baseline,
        controls=spec.controls,
        margin=spec.margin.model_dump(),
        arms=[_planned(checked, arm) for arm in arms],
        n_short_runs=n_short,
        n_further_rates=spec.rate.extend,
        n_runs=sum(len(arm.seeds) for arm in arms),
        n_beam_runs=n_beam,
        unchecked=checked.unchecked,
    )


def show_plans(plans: Plans) -> None:
    """Print the plans of `compare.plan` on stdout."""
    for plan in plans.studies:
        _show_plan(plan)


def show_results(result: Compared | ComparedModels, output: Path) -> None:
    """Print the main table of what `compare.compare` returned, on stdout, and where more is."""
    columns = verdict_columns(["bleu", "nll"])
    studies = result.studies if isinstance(result, ComparedModels) else {str(output): result}
    for folder, study in studies.items():
        print(f"study {study.study}: {study.status}")
        print(markdown_table(columns, study.finished) if study.finished else "no run is done yet")
        print(f"report: {Path(folder) / 'results.md'}")


def _show_plan(plan: Plan) -> None:
    rows = ", ".join(f"{n} {split}" for split, n in plan.n_rows.items()) or "not known"
    print(f"study {plan.study}: {plan.model} on {plan.data}, rows: {rows}")
    table = Table(box=None, pad_edge=False)
    for name in ("arm", "method", "layers", "rank", "epochs", "trained weights", "steps"):
        table.add_column(name, justify="left" if name in ("arm", "method", "layers") else "right")
    table.add_column("rates")
    table.add_column("seeds")
    for arm in plan.arms:
        layers = arm.policy if arm.layers is None else layer_ranges(arm.layers, EN_DASH)
        table.add_row(
            arm.name,
            arm.method,
            layers,
            str(arm.rank or "-"),
            str(arm.epochs),
            "?" if arm.n_trainable is None else f"{arm.n_trainable:,}",
            str(arm.n_steps or "?"),
            "?" if arm.rates is None else " ".join(map(rate_name, arm.rates)),
            " ".join(map(str, arm.seeds)),
        )
    Console(highlight=False, width=200).print(table)
    if not plan.controls:
        print("no controls: chosen layers are not compared with any others")
    print(
        f"{plan.n_runs} measured runs, {plan.n_short_runs} short ones to choose learning "
        f"rates, {plan.n_beam_runs} evaluations with beam search"
    )
    if plan.n_further_rates and plan.n_short_runs:
        n_all = plan.n_further_rates * sum(
            arm.rates is None or len(arm.rates) > 1 for arm in plan.arms
        )
        print(
            f"where the best rate of an arm is at an edge, up to {plan.n_further_rates} further "
            f"short runs of that arm, {n_all} in all at most"
        )
    for reason in plan.unchecked:
        print(f"not checked: {reason}")


def _planned(checked: Checked, arm: Arm) -> PlannedArm:
    adapter = arm.settings.adapter
    has_rank = "rank" in settings_of(adapter.method)
    return PlannedArm(
        name=arm.name,
        method=arm.method,
        policy=str(arm.policy),
        layers=None if arm.layers is None else list(arm.layers),
        control_of=arm.control_of,
        rank=adapter.rank if has_rank else None,
        epochs=arm.settings.train.epochs or 1,
        n_trainable=checked.n_trainable(arm),
        n_steps=checked.n_steps(arm.settings),
        rates=list(arm.rates) if arm.has_rates else None,
        seeds=list(arm.seeds),
    )
