"""An adapter on the model of a job: attached, trained step by step, saved."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.disk_space import check_space, on_one_disk, total_bytes
from swlora.errors import DivergedError
from swlora.job import Job
from swlora.layer_policy import layer_ranges
from swlora.memory import FREE_SHARE, kept_for_steps, steps_limit_bytes
from swlora.models.identity import identify_base
from swlora.paths import cache_dir
from swlora.preparation import PreparedTraining
from swlora.processes import check_alike, from_main, wait, world
from swlora.run_place import STOPPED

if TYPE_CHECKING:
    from swlora.adapters.adapted import Adapted
    from swlora.adapters.card import Facts
    from swlora.training.checkpoint import LoopState
    from swlora.training.plain import PlainStep
    from swlora.training.schedule import Schedule
    from swlora.training.step import TreeStep
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
        resolved = spec.model_copy(update={"train": schedule.spec})
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
        f"training {n_trainable:,} weights ({spec.adapter.method}) in layers "
        f"{layer_ranges(layers)} on {facts['data']['rows']:,} rows{processes}"
    )
    return Attached(adapted, n_trainable, facts, loaded.tokenizer)


def run_steps(
    job: Job, prepared: PreparedTraining, adapted: "Adapted", watch: "Watch | None"
) -> "LoopState":
    """Run all steps of a training, or those that an earlier process left undone."""
    import torch

    from swlora.training.dealt_step import DealtStep
    from swlora.training.loop import train as run_loop
    from swlora.training.step import make_step
    from swlora.training.stopping import StopRequest

    def rows_of(groups: Sequence[Any]) -> str:
        return _rows(job, [int(i) for ids in groups for i in ids])

    n_steps, keeps_best = prepared.schedule.n_steps, bool(watch and watch.best_folder)
    with job.timed("prepare"):
        kept_bytes = check_disk(job, adapted, n_steps=n_steps, keeps_best=keeps_best)
        ready = make_step(
            adapted.model, prepared.sequences, job.spec.train, job.progress.say, kept_bytes
        )
    with closing(ready) as step:
        with job.timed("prepare"):
            step_bytes = fit_steps(job, prepared.schedule, step)
            copies_bytes = worth_copies(prepared.schedule, step)
        stop = StopRequest()
        job.run.record(processes=world().size)
        run_step = DealtStep(step, adapted, stop) if world().is_shared else step
        torch.manual_seed(job.spec.seed)  # dropout
        try:
            with job.timed("train"), kept_for_steps(step_bytes, copies_bytes=copies_bytes):
                state = run_loop(
                    run_step,
                    prepared.schedule,
                    adapted,
                    job.run,
                    job.progress,
                    watch,
                    rows_of=rows_of,
                    stop=stop,
                    callbacks=job.callbacks if world().is_main else (),
                )
        except DivergedError as error:
            rows = _rows(job, error.sequence_ids)
            where = f" (rows of that step: {rows})" if rows else ""
            raise DivergedError(f"{error}{where}") from None
    if stop.ends and (n_done := state.totals.step) < n_steps:
        job.run.record(**{STOPPED: n_done})
        job.progress.say(f"a callback ended the training after step {n_done} of {n_steps}")
    return state


def fit_steps(job: Job, schedule: "Schedule", step: "TreeStep | PlainStep") -> int:
    """Let a step run trees that fit into memory; return the bytes that it takes.

    A run that goes on has the trees with which it began, which decide its last bits. Padded
    batches, and steps on a GPU, whose memory runs out without harm, are left alone.
    """
    from swlora.training.step import TreeStep
    from swlora.training.step_memory import fit_into_memory

    if not isinstance(step, TreeStep):
        return 0
    if (device := step.base_model.device.type) != "cpu":
        if device == "cuda":
            choose_attention(job, schedule, step)
        return 0
    wait()  # for all to have their models
    began_with = job.run.facts.get("tokens_at_once")
    step.most_nodes = began_with if isinstance(began_with, int) else None
    is_resumed, say = bool(job.run.facts.get("resumed")), job.progress.say
    share = 1 if is_resumed else FREE_SHARE
    # Of several processes the first one's memory stands for all.
    limit_bytes = from_main(lambda: steps_limit_bytes(share=share))
    needed = fit_into_memory(step, schedule, limit_bytes, say, keeps_trees=is_resumed)
    needed, step.most_nodes = from_main(lambda: (needed, step.most_nodes))
    job.run.record(tokens_at_once=step.most_nodes)
    return needed


def worth_copies(schedule: "Schedule", step: "TreeStep | PlainStep") -> int | None:
    """Return the most bytes of copies of weights that pay for themselves in a step; None: any."""
    from swlora.training.step import TreeStep
    from swlora.training.step_memory import copies_worth_bytes

    return copies_worth_bytes(step, schedule) if isinstance(step, TreeStep) else None


def choose_attention(job: Job, schedule: "Schedule", step: "TreeStep") -> None:
    """Take the kernels of attention with which a run began, else those that its first tree shows.

    They sum in different orders, which decides the last bits. Of several processes the first one
    chooses, for all.
    """
    from swlora.kernels import cuda_attention

    def chosen() -> dict[str, str]:
        began_with = job.run.facts.get("attention")
        cuda_attention.prefer(began_with if isinstance(began_with, dict) else {})
        step.try_attention(schedule.epoch(0)[0])
        return cuda_attention.chosen()

    job.run.record(attention=(choice := from_main(chosen)))
    if not world().is_main:
        cuda_attention.prefer(choice)


def check_disk(job: Job, adapted: "Adapted", *, n_steps: int, keeps_best: bool) -> int:
    """Raise UserError where the run folder's disk has no room for what a training writes.

    Returns the bytes that it takes of the disk on which the cache lies.
    """
    from swlora.training.disk_needs import training_needs

    folder, checkpoint = job.run.folder, job.run.checkpoint
    if folder is None or checkpoint is None:
        return 0
    needs = training_needs(
        adapted,
        job.loaded.tokenizer,
        checkpoint,
        n_steps=n_steps,
        n_checkpoints=job.spec.train.keep_checkpoints + 1,
        keeps_best=keeps_best,
    )
    check_space(folder, needs, f"free some, then --resume --output {folder}")
    return total_bytes(needs) if on_one_disk(folder, cache_dir()) else 0


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
