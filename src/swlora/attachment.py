"""An adapter on the model of a job: attached, trained step by step, saved."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from swlora.errors import DivergedError
from swlora.job import Job
from swlora.layer_policy import layer_ranges
from swlora.memory import kept_for_steps
from swlora.models.identity import identify_base
from swlora.plural import counted
from swlora.preparation import PreparedTraining
from swlora.processes import check_alike, from_main, world
from swlora.room import check_disk, disk_needs, fit_steps, memory_line
from swlora.run_place import STOPPED
from swlora.time_foreseen import TimeForeseen

if TYPE_CHECKING:
    from swlora.adapters.adapted import Adapted
    from swlora.adapters.card import Facts
    from swlora.training.callbacks import Callback
    from swlora.training.checkpoint import LoopState
    from swlora.training.schedule import Schedule
    from swlora.training.step import TreeStep
    from swlora.training.trained import Foreseen
    from swlora.training.watch import Watch

ROWS_NAMED = 5  # of a step that failed


@dataclass(frozen=True)
class Attached:
    """An adapter on the model of a job, and what is noted of it wherever it is saved."""

    adapted: "Adapted"
    n_trainable: int
    facts: "Facts"
    tokenizer: Any

    def save(self, folder: Path, losses_nats: dict[str, float], **more: Any) -> int:
        """Save the adapter as it is now; return the bytes of its weights."""
        from swlora.adapters.saved import save_adapter

        noted = {**self.facts, "losses_nats_per_token": losses_nats, **more}
        return save_adapter(self.adapted.model, folder, noted, self.tokenizer)


def attach(job: Job, schedule: "Schedule", layers: list[int]) -> Attached:
    """Put an untrained adapter into the model of a job, or the one that it starts from."""
    from swlora.adapters.card import training_facts
    from swlora.adapters.methods import adapt, train_mode
    from swlora.adapters.start import start_facts, start_from

    spec, loaded, n_steps = job.spec, job.loaded, schedule.n_steps
    with job.timed("attach"):
        train = schedule.spec.model_copy(update={"epochs": schedule.n_epochs})
        resolved = spec.model_copy(update={"train": train})
        base = identify_base(loaded)
        job.run.record_source(base_weights_sample_sha256=base.weights_sample_sha256)
        check_alike("weights", {"weights_sample_sha256": base.weights_sample_sha256})
        facts = training_facts(resolved, base, job.dataset, layers) | start_facts(spec.adapter)
        if spec.adapter.start is not None:
            adapted = start_from(loaded.model, spec.adapter, seed=spec.seed)
        else:
            adapted = adapt(loaded.model, spec.adapter, layers, seed=spec.seed, n_steps=n_steps)
    train_mode(adapted.model)
    n_trainable = sum(p.numel() for p in adapted.parameters.values())
    processes = f", in {world().size} processes" if world().is_shared else ""
    job.progress.say(
        f"training {counted(n_trainable, 'weight')} ({spec.adapter.method}) in layers "
        f"{layer_ranges(layers)} on {counted(facts['data']['rows'], 'row')}{processes}"
    )
    return Attached(adapted, n_trainable, facts, loaded.tokenizer)


class Ran(NamedTuple):
    """How the steps of a training ended, and what they were foreseen to take and took."""

    state: "LoopState"
    foreseen: "Foreseen"


def run_steps(
    job: Job, prepared: PreparedTraining, adapted: "Adapted", watch: "Watch | None"
) -> Ran:
    """Run all steps of a training, or those that an earlier process left undone.

    Raises UserError before the first one where memory or disk have no room for them.
    """
    from swlora.random_numbers import drawing_by
    from swlora.training.dealt_step import DealtStep
    from swlora.training.loop import train as run_loop
    from swlora.training.step import TreeStep, make_step
    from swlora.training.stopping import StopRequest
    from swlora.training.trained import Foreseen

    def rows_of(groups: Sequence[Any]) -> str:
        return _rows(job, [int(i) for ids in groups for i in ids])

    spec, say = job.spec.train, job.progress.say
    n_steps, keeps_best = prepared.schedule.n_steps, bool(watch and watch.best_folder)
    with job.timed("prepare"):
        needs = disk_needs(job, adapted, n_steps=n_steps, keeps_best=keeps_best)
        kept_bytes = check_disk(job.run.folder, needs, spec.keep_checkpoints)
        ready = make_step(adapted.model, prepared.sequences, spec, say, kept_bytes)
    with closing(ready) as step:
        with job.timed("prepare"):
            if isinstance(step, TreeStep) and step.base_model.device.type == "cuda":
                choose_attention(job, prepared.schedule, step)
            fit = fit_steps(job, prepared, adapted, step)
            if fit.memory:
                say(memory_line(fit.memory))
            foresees = TimeForeseen.of(job, prepared, step)
            told: list[Callback] = [*([foresees] if foresees else []), *job.callbacks]
        stop = StopRequest()
        job.run.record(processes=world().size)
        run_step = DealtStep(step, adapted, stop) if world().is_shared else step
        start_s = time.perf_counter()
        try:
            with (
                job.timed("train"),
                drawing_by(job.spec.seed, job.loaded.model.device),  # dropout
                kept_for_steps(fit.step_bytes, copies_bytes=fit.copies_bytes),
            ):
                state = run_loop(
                    run_step,
                    prepared.schedule,
                    adapted,
                    job.run,
                    job.progress,
                    watch,
                    rows_of=rows_of,
                    stop=stop,
                    callbacks=told if world().is_main else (),
                )
        except DivergedError as error:
            rows = _rows(job, error.sequence_ids)
            where = f" (rows of that step: {rows})" if rows else ""
            raise DivergedError(f"{error}{where}") from None
    used_s, n_done = time.perf_counter() - start_s, state.totals.step
    if stop.ends and n_done < n_steps:
        job.run.record(**{STOPPED: n_done})
        job.progress.say(f"a callback ended the training after step {n_done} of {n_steps}")
    peak_bytes = fit.memory.peak_bytes if fit.memory else None
    train_s = foresees.seconds if foresees and n_done == n_steps else None
    return Ran(state, Foreseen(peak_bytes, train_s, used_s))


def choose_attention(job: Job, schedule: "Schedule", step: "TreeStep") -> None:
    """Take the kernels of attention with which a run began, else those that its first tree shows.

    They sum in different orders, which decides the last bits. Of several processes the first one
    chooses, for all.
    """
    from swlora.kernels import cuda_attention

    began_with = job.run.facts.get("attention")
    cuda_attention.prefer(began_with if isinstance(began_with, dict) else {})
    if step.is_sharded or world().is_main:  # sharded weights are gathered from all
        step.try_attention(schedule.epoch(0)[0])
    job.run.record(attention=(choice := from_main(cuda_attention.chosen)))
    if not world().is_main:
        cuda_attention.prefer(choice)


def _rows(job: Job, sequence_ids: Sequence[int]) -> str:
    """Name the training rows that sequences are of, by their places; only some of many."""
    numbers = sorted({int(job.encoded("train").example_ids[i]) for i in sequence_ids})
    rows, places = job.dataset.split("train"), dict[str, list[str]]()
    for number in numbers[:ROWS_NAMED]:
        source, _, last = rows[number].place_or_row(number).rpartition(" ")
        places.setdefault(source, []).append(last)
    named = "; ".join(f"{source} {', '.join(own)}" for source, own in places.items())
    n_more = len(numbers) - ROWS_NAMED
    return named + (f" and {n_more:,} more" if n_more > 0 else "")
