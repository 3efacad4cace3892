"""The runs of a study, phase by phase: one run is one process and one folder.

identify   layers of `super`, `auto`, ...: once for every arm that needs them
rates      short runs on a slice of the data, one for each arm and learning rate of its grid, then
           round by round one more beyond the grid of each arm whose best is at its edge
runs       the measured runs, seed by seed over all arms, so that a drift hits all alike
beam       some of their adapters once more, with beam search
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from swlora.config import RunSpec, TrainSpec
from swlora.config.train import OF_HELD_OUT
from swlora.study.arms import Arm
from swlora.study.spec import StudySpec, folder_name, rate_name
from swlora.training.schedule import n_epochs, sequences_per_step

Phase = Literal["identify", "rates", "runs", "beam"]


@dataclass(frozen=True)
class Task:
    """One run: `folder` is relative to the study's, `label` tells it from others of its arm.

    `n_rows` are the rows that it trains on, all epochs counted; 0 where it does not train.
    """

    phase: Phase
    arm: str
    label: str
    folder: str
    spec: RunSpec
    n_rows: int = 0
    adapter: str | None = None


def identify_tasks(arms: list[Arm]) -> dict[str, Task]:
    """Return by arm the task that finds its layers; arms with equal needs share one."""
    tasks = {}
    for arm in arms:
        if arm.layers is not None or not arm.policy.needs_search:
            continue
        # What identification finds depends on the model alone; other searches on the arm as well.
        is_shared = arm.policy.needs_identification
        name = folder_name(arm.policy) if is_shared else arm.name
        folder = f"identify/{name}"
        tasks[arm.name] = Task("identify", arm.name, str(arm.policy), folder, arm.settings)
    return tasks


def rate_tasks(arm: Arm, spec: StudySpec, n_train_rows: int) -> list[Task]:
    """Return the short runs among which the arm's learning rate is chosen; none for one rate."""
    if len(arm.rates) == 1:
        return []
    return [rate_task(arm, rate, spec, n_train_rows) for rate in arm.rates]


def rate_task(arm: Arm, rate: float, spec: StudySpec, n_train_rows: int) -> Task:
    """Return the short run of an arm with a learning rate."""
    choice, run = spec.rate, arm.run_spec(seed=spec.rate.seed, rate=rate)
    rows = {"train_rows": choice.train_rows, "eval_prompts": choice.eval_prompts}
    data = run.data.model_copy(update={**rows, "eval_split": "dev"})
    limits = [n for n in (choice.max_steps, run.train.max_steps) if n is not None]
    short = {"max_steps": min(limits, default=None), "eval_every_steps": 0}
    unwatched = {name: getattr(TrainSpec(), name) for name in OF_HELD_OUT}
    train = run.train.model_copy(update=short | unwatched)
    run = run.model_copy(update={"data": data, "train": train})
    name, n_rows = rate_name(rate), min(choice.train_rows, n_train_rows)
    return Task("rates", arm.name, name, f"rates/{arm.name}/{name}", run, _all_rows(run, n_rows))


def is_at_edge(rates: Collection[float], chosen: float) -> bool:
    """Say whether the chosen one of several rates is the lowest or the highest."""
    return len(rates) > 1 and chosen in (min(rates), max(rates))


def rate_beyond(rates: Collection[float], chosen: float) -> float | None:
    """Return the next rate beyond the edge of a grid where the chosen one lies; None inside.

    It is as far from the edge as the edge is from its neighbour, in proportion. None too where no
    positive, finite number of three digits lies there that has another name than those tried.
    """
    if not is_at_edge(rates, chosen):
        return None
    order, named = sorted(rates), [float(rate_name(rate)) for rate in rates]
    neighbour = order[1] if chosen == order[0] else order[-2]
    beyond = float(f"{chosen * (chosen / neighbour):.3g}")
    return beyond if 0 < beyond < min(named) or max(named) < beyond < math.inf else None


def run_tasks(arms: list[Arm], rates: Mapping[str, float], n_train_rows: int) -> list[Task]:
    """Return the measured runs of the arms that have a rate, one seed of all arms after another."""
    return [
        Task("runs", arm.name, f"seed-{seed}", f"runs/{arm.name}/seed-{seed}", run, n_rows)
        for seed in dict.fromkeys(seed for arm in arms for seed in arm.seeds)
        for arm in arms
        if seed in arm.seeds and arm.name in rates
        for run in [arm.run_spec(seed=seed, rate=rates[arm.name])]
        for n_rows in [_all_rows(run, n_train_rows)]
    ]


def beam_tasks(runs: list[Task], spec: StudySpec) -> list[Task]:
    """Return the evaluations with beam search of the runs that the study names for them."""
    return [
        Task(
            "beam",
            task.arm,
            task.label,
            f"beam/{task.arm}/{task.label}",
            task.spec.model_copy(update={"decode": spec.beam.decode}),
            adapter=task.folder,
        )
        for task in runs
        if task.arm in spec.beam.arms and task.spec.seed in (spec.beam.seeds or [task.spec.seed])
    ]


def _all_rows(run: RunSpec, n_rows: int) -> int:
    """Return the rows that a run trains on, all epochs counted."""
    rows, limit = n_rows * n_epochs(run.train, n_rows), run.train.max_steps
    return rows if limit is None else min(rows, limit * sequences_per_step(run.train, n_rows))
