"""What is known of a job before its work begins: its sequences, its steps, that it can be done."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from swlora.config import DEFAULT_BATCH_SIZE, EARLIER_BATCH_SIZE, TrainSpec
from swlora.data.prefix_tree import count_group_nodes
from swlora.data.summary import short_lines
from swlora.data.token_sequences import Ints, TokenSequences
from swlora.errors import UserError
from swlora.job import Job
from swlora.models.load import LoadedModel
from swlora.models.provenance import tokenizer_sha256
from swlora.open_settings import check_rate_trial, settle
from swlora.plural import counted
from swlora.preview import summarise
from swlora.processes import check_alike, from_main, world
from swlora.run_settings import Change, specs_by_step

if TYPE_CHECKING:
    from swlora.evaluation.held_out import Measurements
    from swlora.training.schedule import Schedule

SAME_IN_ALL = ("train_tokens_sha256", "held_out_tokens_sha256", "tokenizer_sha256")  # processes


@dataclass(frozen=True)
class PreparedTraining:
    """What a training begins with: its sequences and steps, and what is measured on which others.

    `held_out` is None where there is nothing to measure on.
    """

    sequences: TokenSequences
    schedule: "Schedule"
    measurements: "Measurements | None"
    held_out: TokenSequences | None

    @cached_property
    def held_out_nodes(self) -> Ints:
        """Nodes of the trees that a measurement runs, (n,); empty where nothing is measured."""
        from swlora.evaluation.loss import trees_at_once

        if self.held_out is None:
            return np.zeros(0, dtype=np.int64)
        return count_group_nodes(self.held_out, trees_at_once(self.held_out))


def check_reporting(spec: TrainSpec, *, has_folder: bool) -> None:
    """Raise UserError where a training cannot tell of itself as asked; nothing is loaded.

    `has_folder` says whether its run has one.
    """
    from swlora.evaluation.samples import read_prompts
    from swlora.trackers import check_trackers

    if world().is_main:
        check_trackers(spec, has_folder=has_folder)
    read_prompts(spec.sample_prompts)


def prepare_training(job: Job) -> PreparedTraining:
    """Load, encode and check what a training needs, then begin the run."""
    check_reporting(job.spec.train, has_folder=job.run.folder is not None)
    check_rate_trial(job)
    if job.spec.train.shard:
        job.load_shard()
    sequences = job.encoded("train").sequences
    settled = settle(job)
    schedule, planned = planned_schedule(job, sequences, job.progress.say)
    held_out = encode_held_out(job, planned)
    record_tokens(job, sequences, held_out)
    job.note_computing()
    check_adapter(job, schedule.n_steps)
    job.begin()
    summary = summarise(job, schedule)
    for line in (*settled, *short_lines(summary)):
        job.progress.say(line)
    job.run.write_result({"data": summary})
    return PreparedTraining(sequences, schedule, planned, held_out)


def replanned(job: Job, prepared: PreparedTraining) -> PreparedTraining:
    """Return a training with its steps planned anew: the run has noted more since."""
    schedule, _ = planned_schedule(job, prepared.sequences, lambda _line: None)  # said before
    return replace(prepared, schedule=schedule)


def planned_schedule(
    job: Job, sequences: TokenSequences, say: Callable[[str], None]
) -> "tuple[Schedule, Measurements | None]":
    """Return the steps of a training, and what is measured while they run; `say` what is new.

    Of one that goes on with other settings the steps change from where it stands, and what is
    measured stays: losses are compared with those before. UserError where no step is left.
    """
    from swlora.evaluation.held_out import planned_measurements
    from swlora.training.changed_schedule import ChangedSchedule, Stretch
    from swlora.training.checkpoint import steps_done
    from swlora.training.schedule import Schedule, data_note

    spec, goes_on = job.spec, bool(job.run.facts.get("resumed"))
    n_done = from_main(lambda: steps_done(job.run.checkpoint) if goes_on else 0)
    noted = from_main(lambda: [vars(change) for change in job.run.changes_from(n_done)])
    changes = [Change(**values) for values in noted]
    (_, original), *later = specs_by_step(spec, changes)
    begun = begun_with(job, original.train, len(sequences), n_done)
    stretches = [Stretch(0, begun), *(Stretch(step, own.train) for step, own in later)]
    first = Schedule.of(sequences, begun, spec.seed)
    planned = planned_measurements(begun, n_steps=first.n_steps, n_sequences=first.n_sequences)
    if len(stretches) == 1:
        if not goes_on and (note := data_note(spec.train, len(sequences))):
            say(note)
        schedule = first
    else:
        schedule = ChangedSchedule(sequences, stretches, spec.seed)
    check_enough_sequences(schedule)
    for change in changes:
        say(f"from step {change.step + 1} on: {change}")
    if changes and changes[-1].extends and schedule.n_steps <= n_done:
        asked = f"--epochs {schedule.spec.epochs}"
        if spec.train.max_steps is not None:
            asked += f" and --max-steps {spec.train.max_steps}"
        raise UserError(
            f"the training has done {counted(n_done, 'step')}, all that {asked} allow; larger "
            "numbers there go on with it"
        )
    if planned:
        planned = replace(planned, patience=spec.train.early_stopping)
    return schedule, planned


def begun_with(job: Job, train: TrainSpec, n_sequences: int, n_done: int) -> TrainSpec:
    """Return settings with the epochs, rows a step and rate that the run chose when it began.

    They are noted in run.json: another version may choose other numbers for the same data.
    """
    from swlora.training.schedule import fitted

    noted = from_main(lambda: job.run.facts.get("fitted"))
    if noted is None:
        largest = EARLIER_BATCH_SIZE if n_done else DEFAULT_BATCH_SIZE
        noted = fitted(train, n_sequences, largest).model_dump(include={"epochs", "batch_size"})
        job.run.record(fitted=noted)
    left_to_data = {name: size for name, size in noted.items() if getattr(train, name) is None}
    return train.model_copy(update=left_to_data)


def check_enough_sequences(schedule: "Schedule") -> None:
    """Raise UserError where a whole step has fewer sequences than there are processes.

    Smaller steps, such as the last of an epoch may be, leave some processes without work.
    """
    n, size = world().size, schedule.spec.batch_size or 1
    if size < n:
        raise UserError(
            f"a step has {counted(size, 'sequence')}, fewer than the {n} "
            f"processes: start {size} of them at most, or give --batch-size {n} or more"
        )


def record_tokens(job: Job, sequences: TokenSequences, held_out: TokenSequences | None) -> None:
    """Record what is trained on; UserError where a run that goes on began with other tokens.

    They are known by a hash, which sees all that makes them: rows, tokenizer, template, the way
    rows are cut. A run of an older version has none, and goes on unless rows of it are cut.
    """
    facts, n_cut = job.run.facts, job.encoded("train").n_cut
    if n_cut and facts.get("resumed") and "train_tokens_sha256" not in facts:
        raise UserError(
            f"this run cannot go on: {n_cut:,} of its rows are cut to the context, and the older "
            "swlora that began it may have cut them in another way; finish it with that one "
            "(`packages` in its run.json), or begin again in another --output"
        )
    job.run.record_source(train_tokens_sha256=sequences.sha256())
    if held_out is not None:
        job.run.record_source(held_out_tokens_sha256=held_out.sha256())
    job.run.record_source(tokenizer_sha256=tokenizer_sha256(job.loaded.tokenizer))
    check_alike("data", {name: job.run.facts.get(name) for name in SAME_IN_ALL})


def encode_held_out(job: Job, planned: "Measurements | None") -> TokenSequences | None:
    """Return what is measured while training; None where there is none and nobody asked for it.

    Raises UserError where there is none for what was asked.
    """
    found = _encode_measured(job, planned) if planned else None
    if found is None and job.spec.train.sample_prompts:
        raise UserError(
            "--sample-prompts are continued where held-out rows are measured, and there are none: "
            "leave it out, or name some (--eval-file, --eval-share)"
        )
    return found


def _encode_measured(job: Job, planned: "Measurements") -> TokenSequences | None:
    split = job.spec.data.eval_split
    if not (planned.is_asked or job.dataset.has(split)):
        job.progress.say(f"the data set has no {split} split, so no held-out loss is measured")
        return None
    sequences = job.encoded(split, planned.n_rows).sequences
    if line := _chosen_by_test_rows(job, planned):
        job.progress.say(line)
    if planned.is_asked and job.run.folder is None:
        job.progress.say(
            "the adapter with the lowest held-out loss is not kept: that needs a run folder"
        )
    return sequences


def _chosen_by_test_rows(job: Job, planned: "Measurements") -> str | None:
    """Say what is chosen by the rows on which a person will score it; None where nothing is."""
    data, stops = job.spec.data, planned.patience is not None
    choices = {
        "when to stop": stops,
        "which adapter is best": planned.is_asked and job.run.folder is not None,
    }
    chosen = " and ".join(what for what, is_chosen in choices.items() if is_chosen)
    has_file = data.eval_file is not None  # its rows are dev and test at once
    if not chosen or not (has_file or data.eval_split == "test"):
        return None
    rows = "rows of --eval-file" if has_file else "test rows"
    scores = "scores" if stops else "its scores"  # without stopping, adapter/ is as it would be
    has_other_dev = job.dataset.has("dev") and not has_file
    instead = "--split dev leaves them unseen" if has_other_dev else "evaluate on other rows"
    return f"the {rows} say {chosen}, so that {scores} on them will flatter; {instead}"


def check_adapter(job: Job, n_steps: int) -> None:
    """Refuse an adapter that cannot be trained in this model, before any work is done."""
    from swlora.adapters.methods import check_fit
    from swlora.models.anatomy import Anatomy
    from swlora.training.layer_profile import check_trees

    spec, anatomy = job.spec, Anatomy(job.loaded.model)
    policy = spec.adapter.layers
    if job.will_identify:
        _ = job.identification_windows  # raises what is wrong with them, before anything else runs
    elif policy.time_budget is not None:
        check_trees(anatomy, "--layers auto")
    # The first layer stands for layers that are not found yet.
    layers = [0] if policy.needs_search else policy.resolve(anatomy.n_layers)
    check_fit(anatomy, spec.adapter, layers, n_steps=n_steps)


def check_weights_alike(loaded: LoadedModel, **more: str | None) -> None:
    """Raise UserError where another process has another model, or other values of `more`."""
    from swlora.models.identity import weights_sample_sha256

    if world().is_shared:
        sample = weights_sample_sha256(loaded.model)
        check_alike("weights", {"weights_sample_sha256": sample, **more})
