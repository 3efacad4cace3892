"""What a training would do and take, without training: `swlora train --dry-run`.

The data are read and the adapter is put on the model as a training does, memory and disk are
foreseen by the same functions, and a few real steps are run for the time, which leave no trace.
"""

from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from swlora.adapters.methods import METHODS, adapted_modules
from swlora.attachment import Attached, attach
from swlora.config import method_rate
from swlora.disk_space import Need
from swlora.errors import UserError
from swlora.job import Job
from swlora.layer_policy import parse_policy
from swlora.memory import kept_for_steps
from swlora.models.anatomy import Anatomy
from swlora.preparation import PreparedTraining, prepare_training
from swlora.processes import world
from swlora.result_json import IF_ANY
from swlora.room import check_disk, disk_needs, fit_steps
from swlora.time_foreseen import work_of
from swlora.training.forecast import Rates, Work, over_steps, probe
from swlora.training.kept_states import KeptStates, kept_states
from swlora.training.memory_parts import MemoryParts, adapted_maps
from swlora.training.plain import PlainStep
from swlora.training.step import TreeStep, make_step


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of all steps and of what is measured between them; loading and saving are not in it.

    `first_s` is what the first step takes more than others, `probed_steps` how many were run.
    """

    train_s: float
    step_s: float
    first_s: float
    probed_steps: int


@dataclass(frozen=True)
class Estimate:
    """What a training would do and take.

    `layers` are those that are adapted; where they are found by a search or a trial first,
    `layers_found_by` names it and all are assumed, which take most. `maps` counts the adapted ones
    by their names. `n_tokens` and `n_nodes` are those that all steps run, flat and in trees;
    `n_nodes` is None where no trees are run. `memory` is None where it is not foreseen, `time`
    where there is no room for the training: `refused` says why. `learning_rate` is None where it is
    found first, by what `learning_rate_of` says.
    """

    model: str
    dtype: str
    n_weights: int
    method: str
    rank: int | None
    layers: list[int]
    layers_found_by: str | None
    maps: dict[str, int]
    n_trainable: int
    data: str
    n_rows: int
    n_tokens: int
    n_nodes: int | None
    n_steps: int
    n_epochs: int
    learning_rate: float | None
    learning_rate_of: str | None
    memory: MemoryParts | None
    time: TimeEstimate | None
    disk: dict[str, int]
    kept_states_bytes: int
    missing_states_bytes: int
    refused: str | None = field(default=None, metadata=IF_ANY)


def estimate_training(job: Job) -> Estimate:
    """Return what the training of `job.spec` would do and take; nothing is written.

    Raises UserError for what a training refuses, but for a lack of memory or disk.
    """
    if world().is_shared:
        raise UserError("--dry-run works in one process; start it without a launcher")
    policy, train, rate_of = job.spec.adapter.layers, job.spec.train, None
    if train.find_learning_rate:
        rate_of = "a trial, whose time is not counted here"
    elif policy.needs_search and train.learning_rate is None:
        rate_of = "as many layers as are found"
    if policy.needs_search:
        every = job.spec.adapter.model_copy(update={"layers": parse_policy("all")})
        changed: dict[str, Any] = {"adapter": every, "model": job.spec.trained_model}
        if not train.find_learning_rate:  # the default of all layers, about which nothing is said
            changed["train"] = train.model_copy(update={"learning_rate": method_rate(every)})
        job = replace(job, spec=job.spec.model_copy(update=changed))
    prepared = prepare_training(job)
    anatomy = Anatomy(job.loaded.model)
    layers = job.spec.adapter.layers.resolve(anatomy.n_layers)
    n_weights = sum(p.numel() for p in job.loaded.model.parameters())
    attached = attach(job, prepared.schedule, layers)
    adapted = attached.adapted
    spec = job.spec.train.model_copy(update={"cache_gb": 0.0})  # the probe keeps no states
    with closing(make_step(adapted.model, prepared.sequences, spec, job.progress.say)) as step:
        found = _look(job, prepared, attached, step)
    method = METHODS[job.spec.adapter.method]
    return Estimate(
        model=job.loaded.source,
        dtype=str(job.loaded.model.dtype).removeprefix("torch."),
        n_weights=n_weights,
        method=job.spec.adapter.method,
        rank=None if method.first_rank is None else job.spec.adapter.rank,
        layers=layers,
        layers_found_by=str(policy) if policy.needs_search else None,
        maps=adapted_maps(anatomy, adapted_modules(adapted.model)),
        n_trainable=attached.n_trainable,
        data=job.dataset.source,
        n_rows=len(np.unique(job.encoded("train").example_ids)),
        n_tokens=_n_tokens(prepared),
        n_nodes=found.work.step_nodes if isinstance(step, TreeStep) else None,
        n_steps=prepared.schedule.n_steps,
        n_epochs=prepared.schedule.n_epochs,
        learning_rate=None if rate_of else train.learning_rate or job.spec.train.rate,
        learning_rate_of=rate_of,
        memory=found.memory,
        time=found.time,
        disk={need.what: need.n_bytes for need in found.disk},
        kept_states_bytes=found.kept.n_bytes,
        missing_states_bytes=found.kept.missing_bytes,
        refused=found.refused,
    )


@dataclass(frozen=True)
class _Found:
    work: Work
    disk: list[Need]
    kept: KeptStates
    memory: MemoryParts | None
    time: TimeEstimate | None
    refused: str | None


def _look(
    job: Job, prepared: PreparedTraining, attached: Attached, step: TreeStep | PlainStep
) -> _Found:
    """Foresee disk, memory and, where there is room for both, the time."""
    adapted, spec, say = attached.adapted, job.spec.train, job.progress.say
    n_steps, planned = prepared.schedule.n_steps, prepared.measurements
    keeps_best = bool(planned and planned.is_asked and prepared.held_out is not None)
    disk = disk_needs(job, adapted, n_steps=n_steps, keeps_best=keeps_best)
    kept_bytes, fit, refused = 0, None, None
    try:
        kept_bytes = check_disk(job.run.folder, disk, spec.keep_checkpoints)
        fit = fit_steps(job, prepared, adapted, step)
    except UserError as error:
        refused = str(error)
    kept = kept_states(step, spec, kept_bytes, say)
    work = work_of(prepared, step, kept)
    if fit is None:
        return _Found(work, disk, kept, None, None, refused)
    with (
        job.progress.task("run a few steps for the time"),
        kept_for_steps(fit.step_bytes, copies_bytes=fit.copies_bytes),
    ):
        rates = probe(step, prepared.schedule, adapted, work)
    return _Found(work, disk, kept, fit.memory, _time(rates, work), None)


def _time(rates: Rates, work: Work) -> TimeEstimate:
    seconds = rates.seconds(work)
    return TimeEstimate(
        seconds, rates.step_s * work.step_nodes / work.n_steps, rates.first_s, rates.n_steps
    )


def _n_tokens(prepared: PreparedTraining) -> int:
    """Return the tokens of all sequences that the steps run, each as often as it is run."""
    schedule, lengths = prepared.schedule, prepared.sequences.lengths
    by_step = np.array(
        [sum(int(lengths[ids].sum()) for ids in groups) for groups in schedule.epoch(0)]
    )
    return over_steps(by_step, schedule.n_steps)
