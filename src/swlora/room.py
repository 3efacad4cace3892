"""Whether memory and disk have room for a training, known before its first step.

A step is made to fit where it can be (`training.fitting`); what then takes more memory than there
is, or more of the disk, ends the training in one line before it begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from swlora.disk_space import Need, check_space, free_bytes, on_one_disk, size, total_bytes
from swlora.job import Job
from swlora.memory import (
    FREE_SHARE,
    available_bytes,
    copies_limit_bytes,
    is_limited,
    kept_for_steps,
    steps_limit_bytes,
)
from swlora.paths import cache_dir
from swlora.preparation import PreparedTraining
from swlora.processes import from_main, wait, world

if TYPE_CHECKING:
    from swlora.adapters.adapted import Adapted
    from swlora.training.fitting import Fitted
    from swlora.training.memory_parts import MemoryParts
    from swlora.training.plain import PlainStep
    from swlora.training.schedule import Schedule
    from swlora.training.step import TreeStep

EXACT_FROM_SHARE = 0.05  # of what the process holds; a step that takes less is not measured


@dataclass(frozen=True)
class Fit:
    """What the steps of a training may take, in bytes: for a step, and for copies of weights.

    `memory` has all parts; None where it is not foreseen: on a GPU, for padded batches and in
    several processes.
    """

    step_bytes: int
    copies_bytes: int | None
    memory: "MemoryParts | None"


def fit_steps(
    job: Job, prepared: PreparedTraining, adapted: "Adapted", step: "TreeStep | PlainStep"
) -> Fit:
    """Let a step run trees that fit into memory; return what it takes, and all the rest.

    A run that goes on has the trees with which it began, and no more copies of weights, both of
    which decide its last bits. Padded
    batches, and steps on a GPU, whose memory runs out without harm, are left alone. Raises
    UserError where it does not fit all the same, with what would.
    """
    from swlora.training.fitting import check_fits, copies_worth_bytes
    from swlora.training.step import TreeStep

    if not isinstance(step, TreeStep):
        return Fit(0, None, None)
    if step.base_model.device.type != "cpu":
        return Fit(0, copies_worth_bytes(step, prepared.schedule), None)
    wait()  # for all to have their models
    held_bytes, free = _loaded_bytes(draws=job.run.folder is not None), available_bytes()
    fitted = _fitted(job, prepared.schedule, step, held_bytes)
    worth = copies_worth_bytes(step, prepared.schedule)
    if world().is_shared:
        return Fit(fitted.needed_bytes, worth, None)
    whose = "--memory-gb allows" if is_limited() else "there are"
    check_fits(step, fitted, steps_limit_bytes(share=1), whose)
    with kept_for_steps(fitted.needed_bytes, copies_bytes=worth):
        worth = _copies_begun_with(job)
    with kept_for_steps(fitted.needed_bytes, copies_bytes=worth):
        memory = _parts(job, prepared, adapted, step, fitted, held_bytes, free)
    return Fit(fitted.needed_bytes, worth, memory)


def _loaded_bytes(*, draws: bool) -> int:
    """Return what the process holds, with the libraries that a training is going to load."""
    from swlora.training.memory_parts import resident_bytes

    if draws:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    return resident_bytes()


def _fitted(job: Job, schedule: "Schedule", step: "TreeStep", held_bytes: int) -> "Fitted":
    from swlora.training.fitting import fit_into_memory

    began_with = job.run.facts.get("tokens_at_once")
    step.most_nodes = began_with if isinstance(began_with, int) else None
    is_resumed, say = bool(job.run.facts.get("resumed")), job.progress.say
    share = 1 if is_resumed else FREE_SHARE
    # Of several processes the first one's memory stands for all.
    limit_bytes = from_main(lambda: steps_limit_bytes(share=share))
    rough_up_to = None if world().is_shared else int(EXACT_FROM_SHARE * held_bytes)
    fitted = fit_into_memory(
        step, schedule, limit_bytes, say, keeps_trees=is_resumed, rough_up_to_bytes=rough_up_to
    )
    needed, step.most_nodes = from_main(lambda: (fitted.needed_bytes, step.most_nodes))
    job.run.record(tokens_at_once=step.most_nodes)
    return replace(fitted, needed_bytes=needed)


def _copies_begun_with(job: Job) -> int:
    """Return what copies of weights may take: on some processors they give other last bits."""
    noted = job.run.facts.get("copies_limit_bytes") if job.run.facts.get("resumed") else None
    if isinstance(noted, int):
        return noted
    limit_bytes = copies_limit_bytes()
    job.run.record(copies_limit_bytes=limit_bytes)
    return limit_bytes


def _parts(
    job: Job,
    prepared: PreparedTraining,
    adapted: "Adapted",
    step: "TreeStep",
    fitted: "Fitted",
    held_bytes: int,
    free: int,
) -> "MemoryParts":
    from swlora.training.forecast import largest_group_nodes
    from swlora.training.memory_parts import Passes, memory_parts

    held_out, below = int(prepared.held_out_nodes.max(initial=0)), 0
    if step.walk.cut > 0:
        below = max(fitted.n_nodes, largest_group_nodes(step.sequences))
    return memory_parts(
        step,
        adapted,
        fitted,
        Passes(below, held_out),
        held_bytes=held_bytes,
        copies_limit_bytes=copies_limit_bytes(),
        has_checkpoint=job.run.folder is not None,
        free_bytes=free,
    )


def memory_line(memory: "MemoryParts") -> str:
    """Say in one line what a training takes at its peak, and of what."""
    largest = max(memory.in_turns, key=lambda part: part[1])
    parts = [
        ("process", memory.process_bytes),
        ("weights", memory.weights_bytes),
        ("copies of weights", memory.copies_bytes),
        ("adapter and optimizer", memory.adapter_bytes),
        largest,
    ]
    said = ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in parts if n_bytes)
    return f"peak memory: about {size(memory.peak_bytes)} ({said})"


def disk_needs(job: Job, adapted: "Adapted", *, n_steps: int, keeps_best: bool) -> list[Need]:
    """Return what a training writes into its run folder; nothing where it has none."""
    from swlora.training.disk_needs import training_needs

    folder, checkpoint = job.run.folder, job.run.checkpoint
    if folder is None or checkpoint is None:
        return []
    return training_needs(
        adapted,
        job.loaded.tokenizer,
        checkpoint,
        n_steps=n_steps,
        n_checkpoints=job.spec.train.keep_checkpoints + 1,
        keeps_best=keeps_best,
    )


def check_disk(folder: Path | None, needs: Sequence[Need], n_kept: int) -> int:
    """Raise UserError where the run folder's disk has no room for what a training writes.

    `n_kept` checkpoints are kept. Returns the bytes that it takes of the disk on which the cache
    lies.
    """
    if folder is None:
        return 0
    remedy = f"free some, then --resume --output {folder}"
    fewer = sum(
        need.n_bytes * 2 // (n_kept + 1) if need.what == "checkpoints" else need.n_bytes
        for need in needs
    )
    if n_kept > 1 and fewer <= free_bytes(folder):
        remedy = f"--keep-checkpoints 1 would fit, with {size(fewer)}; or {remedy}"
    check_space(folder, needs, remedy)
    return total_bytes(needs) if on_one_disk(folder, cache_dir()) else 0
