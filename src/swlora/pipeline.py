"""identify -> choose layers -> train -> evaluate, for one configuration.

The command line, the studies, the web page and Python's `swlora.train` and its like all call these
functions and nothing below them. Each returns what it found as a value, and writes the same into
the run folder where there is one.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from swlora.assessment import evaluate, measure_untouched_english, wants_english
from swlora.attachment import attach, run_steps
from swlora.errors import UserError
from swlora.files import sha256_of
from swlora.job import Job
from swlora.layer_policy import VerifiedLayers
from swlora.memory import peak_memory_bytes
from swlora.open_settings import note_found_rate, note_rate, noted_rate
from swlora.preparation import (
    PreparedTraining,
    check_reporting,
    check_weights_alike,
    prepare_training,
    replanned,
)
from swlora.prepared_evaluation import prepare_evaluation
from swlora.processes import from_main
from swlora.reporting import reporting, sampler_of

if TYPE_CHECKING:
    from swlora.evaluation.evaluated import Evaluated
    from swlora.evaluation.user_metrics import UserMetric
    from swlora.models.load import LoadedModel
    from swlora.superweights.findings import Identified
    from swlora.training.trained import Trained


def identify(job: Job, figure: Path | None = None, adapter: Path | None = None) -> "Identified":
    """Find super weights, prove each by ablation, write report and figures; return the findings.

    `layers` in the result are those of candidates whose ablation proved them. Leaves
    superweights.md and its figures in the run folder; `figure` names another place for the scan,
    which is drawn there also where there is no folder. With an `adapter` (a folder, or that of its
    run) the model is searched once more with it, and both are compared. Several processes measure
    together.
    """
    from swlora.adapters.merged_in_memory import mergeable_folder
    from swlora.superweights import identify as identification
    from swlora.superweights.figure import check_target
    from swlora.superweights.fine_tuned import check_merging, with_fine_tuned
    from swlora.superweights.report import draw_figure, publish

    if figure is not None:
        check_target(figure)
    tuned = mergeable_folder(adapter) if adapter else None
    job.take_base_of(tuned)
    spec, loaded = job.spec, job.loaded_in_float32()
    windows = job.identification_windows
    adapter_sha256 = check_merging(loaded, tuned, job.progress.say) if tuned else None
    check_weights_alike(loaded, adapter_sha256=adapter_sha256)
    if tuned:
        job.run.record(adapter=str(tuned), adapter_sha256=adapter_sha256)
    job.begin()
    with job.timed("identify"):
        found = identification.identify(
            loaded, spec.identify, windows, seed=spec.seed, progress=job.progress
        )
        if tuned:
            found = with_fine_tuned(
                found, loaded, tuned, spec.identify, windows, seed=spec.seed, progress=job.progress
            )
        if folder := job.run.folder:
            found = publish(found, folder, figure or folder / "superweights.png")
        elif figure is not None:
            found = draw_figure(found, figure)
    job.run.write_result({"identify": found})
    return found


def train(job: Job) -> "Trained":
    """Train the adapter of `job.spec`; return the adapted model and what was done.

    Leaves adapter/ (a standard PEFT adapter), metrics.jsonl and loss.png in the run folder, and
    best/ where held-out losses were asked for: the adapter with the lowest.
    """
    prepared = prepare_training(job)  # before a search, which is long
    layers = choose_layers(job)
    return train_prepared(job, at_found_rate(job, prepared, layers), layers)


def train_prepared(job: Job, prepared: PreparedTraining, layers: list[int]) -> "Trained":
    """Do what `train` does once rows, layers and learning rate are settled."""
    from swlora.adapters.card import last_losses
    from swlora.evaluation.held_out import watch_of
    from swlora.evaluation.loss_curve import course_of, draw_loss
    from swlora.training.trained import Trained

    folder = job.run.folder
    attached = attach(job, prepared.schedule, layers)
    adapted, watch = attached.adapted, None
    if (planned := prepared.measurements) and (rows := prepared.held_out):
        best, sampler = folder / "best" if folder else None, sampler_of(job, attached.facts)
        watch = watch_of(adapted, rows, planned, attached.save, best, sampler)
    with reporting(job) as trackers:
        state, foreseen = run_steps(job, prepared, adapted, watch)
        adapted.finish()
        metrics, adapter_bytes = from_main(job.run.metrics), None
        if folder:
            adapter_bytes = attached.save(folder / "adapter", last_losses(metrics))
            draw_loss(metrics, folder / "loss.png")
        peak_bytes = peak_memory_bytes(adapted.model.device)
        trained = Trained(
            replace(job.loaded, model=adapted.model, adapter_facts=attached.facts),
            method=job.spec.adapter.method,
            layers=layers,
            n_trainable=attached.n_trainable,
            adapter_bytes=adapter_bytes,
            course=course_of(state, prepared.schedule, metrics),
            peak_memory_bytes=peak_bytes,
            adapter=folder / "adapter" if folder else None,
            loss_figure=folder / "loss.png" if folder else None,
            rank_pattern=adapted.ranks,
            best_adapter=watch.best_folder if watch else None,
            foreseen=replace(foreseen, used_peak_memory_bytes=peak_bytes),
        )
        job.run.write_result({"train": trained})
        trackers.result(trained)
    return trained


def choose_layers(job: Job) -> list[int]:
    """Turn the layer policy into layer numbers, by whatever search or measurement it needs.

    Several processes search for super weights together; `auto` is measured by the first one.
    """
    from swlora.models.anatomy import Anatomy
    from swlora.models.precision import cast_parameters, resolve_dtype

    policy, model = job.spec.adapter.layers, job.loaded.model
    if (budget := policy.time_budget) is not None:
        return from_main(lambda: measure_layers(job, budget))
    verified = None
    if policy.needs_identification:
        verified = job.verified_layers()
        if verified is None:
            verified = VerifiedLayers(*identified_layers(job))
        cast_parameters(model, resolve_dtype(job.spec.model.dtype, model.device))
    return policy.resolve(Anatomy(model).n_layers, verified)


def identified_layers(job: Job) -> tuple[list[int], list[int]]:
    """Return the layers of super weights, and those whose removal is undone, by a search."""
    found = identify(job)
    return found.layers, found.removal_layers


def measure_layers(job: Job, budget: float) -> list[int]:
    """Choose the layers of `auto:BUDGET` by a short measurement, and say why.

    A resumed run keeps its layers: a stopwatch would not choose the same ones every time.
    """
    from swlora.training import layer_choice

    if recorded := job.run.read_result().get("layer_choice"):
        return [int(layer) for layer in recorded["layers"]]
    sequences, model = job.encoded("train").sequences, job.loaded.model
    with job.timed("measure_layers"), job.progress.task("measure the layers"):
        choice = layer_choice.choose(model, sequences, job.spec, budget, job.progress)
    for line in layer_choice.lines(choice):
        job.progress.say(line)
    job.run.write_result({"layer_choice": choice})
    return choice.layers


def at_found_rate(job: Job, prepared: PreparedTraining, layers: list[int]) -> PreparedTraining:
    """Return a training at the learning rate that a trial, or the number of found layers, gives it.

    It is the same where the rate was known before. Of several processes the first one tries.
    """
    train = job.spec.train
    is_open = train.learning_rate is None and noted_rate(job) is None
    if train.find_learning_rate and is_open:
        note_rate(job, from_main(lambda: measure_rate(job, prepared, layers)))
    elif not job.spec.adapter.layers.needs_search:
        return prepared
    elif line := note_found_rate(job, len(layers)):
        job.progress.say(line)
    return replanned(job, prepared)


def measure_rate(job: Job, prepared: PreparedTraining, layers: list[int]) -> float:
    """Find the learning rate of adapters in `layers` by short trainings, and say why."""
    from swlora.training import rate_trial

    model, schedule = job.loaded.model, prepared.schedule
    with job.timed("find_learning_rate"):
        choice = rate_trial.choose(
            model, prepared.sequences, job.spec, layers, schedule, job.progress
        )
    for line in rate_trial.lines(choice):
        job.progress.say(line)
    job.run.write_result({"found_rate": choice})
    return choice.learning_rate


def evaluate_adapter(
    job: Job, adapter: Path | None, metric: "UserMetric | None" = None
) -> "Evaluated":
    """Evaluate the adapter in a folder (a run folder will do), or the base model for None."""
    from swlora.adapters.on_base import with_adapter
    from swlora.adapters.saved import WEIGHTS, adapter_folder

    folder = adapter_folder(adapter) if adapter else None
    job.take_base_of(folder)
    job.dataset.split(job.spec.data.eval_split)  # mistyped names shall not cost a model's loading
    prepared = prepare_evaluation(job, metric)
    untouched = measure_untouched_english(job)
    loaded, adapter_sha256 = job.loaded, sha256_of(folder / WEIGHTS) if folder else None
    check_weights_alike(loaded, adapter_sha256=adapter_sha256)
    if folder:
        job.run.record(adapter=str(adapter), adapter_sha256=adapter_sha256)
        loaded = with_adapter(loaded, folder, job.progress.say)
    job.begin()
    return evaluate(job, loaded.model, prepared, untouched, metric)


def evaluate_loaded(
    job: Job, loaded: "LoadedModel", metric: "UserMetric | None" = None
) -> "Evaluated":
    """Evaluate a model that is loaded already, with the adapter that is on it, if any.

    It is what `evaluate_adapter` finds of the same weights in files; the model is afterwards as it
    was. Raises UserError where English text is to be measured, and the model cannot be had without
    its adapter.
    """
    from swlora.adapters.base_model import base_model_of
    from swlora.adapters.temporary import adapter_off, evaluating

    model = loaded.model
    job.take(replace(loaded, model=base_model_of(model)))
    prepared = prepare_evaluation(job, metric)
    with evaluating(model):
        with adapter_off(model) if wants_english(job) else nullcontext():
            untouched = measure_untouched_english(job)
        check_weights_alike(job.loaded)
        if model is not job.loaded.model:
            method = (loaded.adapter_facts or {}).get("method", "of PEFT")
            job.run.record(adapter=f"in memory ({method})")
        job.begin()
        return evaluate(job, model, prepared, untouched, metric)


def train_evaluate(job: Job, metric: "UserMetric | None" = None) -> "tuple[Trained, Evaluated]":
    """Train, then evaluate what was trained.

    Raises UserError for a model that is to be sharded: a part of it cannot generate.
    """
    if job.spec.train.shard:
        raise UserError("train.shard is for swlora train; run that, then swlora eval")
    # What cannot be done shall be known before the training.
    check_reporting(job.spec.train, has_folder=job.run.folder is not None)
    evaluation = prepare_evaluation(job, metric)
    training, layers = prepare_training(job), choose_layers(job)
    training = at_found_rate(job, training, layers)
    # In the dtype in which it is trained: a search for super weights may have had another.
    untouched = measure_untouched_english(job)
    with reporting(job) as trackers:
        trained = train_prepared(job, training, layers)
        evaluated = evaluate(job, trained.model.eval(), evaluation, untouched, metric)
        trackers.result(evaluated)
    return trained, evaluated
