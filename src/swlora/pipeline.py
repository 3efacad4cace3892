"""identify -> choose layers -> train -> evaluate, for one configuration.

The command line, the studies, the web page and Python's `swlora.train` and its like all call these
functions and nothing below them. Each returns what it found as a value, and writes the same into
the run folder where there is one.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.attachment import attach, run_steps
from swlora.errors import UserError
from swlora.files import sha256_of
from swlora.job import Job
from swlora.layer_policy import VerifiedLayers
from swlora.loss_sum import LossSum
from swlora.memory import peak_memory_bytes
from swlora.preparation import (
    PreparedEvaluation,
    PreparedTraining,
    check_reporting,
    check_weights_alike,
    prepare_evaluation,
    prepare_training,
)
from swlora.processes import from_main, world
from swlora.reporting import reporting, sampler_of

if TYPE_CHECKING:
    from swlora.evaluation.evaluated import EnglishLoss, Evaluated
    from swlora.evaluation.scoring import TextsScored
    from swlora.evaluation.user_metrics import UserMetric
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


def train(
    job: Job, prepared: PreparedTraining | None = None, layers: list[int] | None = None
) -> "Trained":
    """Train the adapter of `job.spec`; return the adapted model and what was done.

    `prepared` and `layers` are what `prepare_training` and `choose_layers` gave, if asked before.
    Leaves adapter/ (a standard PEFT adapter), metrics.jsonl and loss.png in the run folder, and
    best/ where held-out losses were asked for: the adapter with the lowest.
    """
    from swlora.adapters.card import last_losses
    from swlora.evaluation.held_out import watch_of
    from swlora.evaluation.loss_curve import course_of, draw_loss
    from swlora.training.trained import Trained

    prepared = prepared or prepare_training(job)  # before a search, which is long
    layers, folder = layers or choose_layers(job), job.run.folder
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
        peak_bytes = peak_memory_bytes(adapted.model.device.type)
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
        cast_parameters(model, resolve_dtype(job.spec.model.dtype, model.device.type))
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


def evaluate(
    job: Job,
    model: Any,
    prepared: PreparedEvaluation,
    untouched: LossSum | None,
    metric: "UserMetric | None" = None,
) -> "Evaluated":
    """Generate once for every distinct prompt, score with all references, measure the losses.

    `prepared` is what `prepare_evaluation` gave, `untouched` what `measure_untouched_english` gave
    for the base model before it was adapted; `metric` is a person's own, and MetricError where it
    fails holds all the rest. Leaves predictions.csv, predictions.jsonl and segments.json (what was
    measured of each prompt) in the run folder. Of several processes each generates for some of the
    prompts, and the first one scores: what the others return has losses, and no scores.
    """
    from swlora.evaluation.dealt import dealt_losses
    from swlora.evaluation.evaluated import Evaluated
    from swlora.evaluation.user_metrics import with_own_metric

    split = job.spec.data.eval_split
    with job.timed("loss"):
        sequences = job.encoded(split).sequences
        losses = dealt_losses(model, sequences, prepared.prompt_of, job.progress)
    english = _measure_english(job, model, untouched)
    texts = _score(job, model, prepared, losses) if prepared.prompts else None
    path = texts.write(job.run.folder) if texts and job.run.folder else None
    loss = sum(losses, LossSum())
    evaluated = Evaluated(
        scores=texts.statistics.scores() if texts else None,
        text_scores=texts.text_scores() if texts else None,
        has_official=job.dataset.is_e2e or any(len(refs) > 1 for refs in prepared.references),
        nll=loss.nats_per_token,
        nll_per_row=loss.sum_nats / prepared.n_rows,
        n_rows=prepared.n_rows,
        nll_sum_nats=loss.sum_nats,
        n_tokens=loss.n_tokens,
        intervals=texts.segments.intervals() if texts else {},
        english=english,
        n_prompts=len(prepared.prompts),
        split=split,
        decode=job.spec.decode,
        data=job.dataset.source,
        predictions=path,
        texts=texts,
    )
    job.run.write_result({"eval": evaluated})
    if metric is not None and world().is_main:  # last, since it may fail in any way
        evaluated = with_own_metric(evaluated, metric)
        job.run.write_result({"eval": evaluated})
    return evaluated


def _score(
    job: Job, model: Any, prepared: PreparedEvaluation, losses: list[LossSum]
) -> "TextsScored | None":
    """Generate the text that follows each prompt; in the first process, score it."""
    from swlora.evaluation.dealt import dealt_texts
    from swlora.evaluation.decode import end_tokens, generate
    from swlora.evaluation.scoring import score_texts

    loaded, prompts, decode = job.loaded, prepared.prompts, job.spec.decode
    with job.timed("generate"):
        ends = end_tokens(loaded, is_chat=prepared.is_chat)

        def generate_some(numbers: Sequence[int]) -> list[str]:
            return generate(
                model,
                loaded.tokenizer,
                prompts,
                decode,
                job.progress,
                end_token_ids=ends,
                seed=job.spec.seed,
                only=numbers,
            )

        sizes = [len(prompt) + decode.max_new_tokens for prompt in prompts]
        texts = dealt_texts(sizes, generate_some)
    if not world().is_main:
        return None
    own = [losses[group] for group in prepared.groups]
    with job.timed("score"), job.progress.task("score"):
        return score_texts(prepared.shown_prompts, texts, prepared.references, own)


def measure_untouched_english(job: Job) -> LossSum | None:
    """Return the base model's loss of English text, None where the run is not to measure it."""
    from swlora.evaluation.english import untouched_english_loss

    wanted, loaded = job.spec.data.english, job.loaded
    if not (job.dataset.is_e2e if wanted is None else wanted):
        return None
    with job.timed("english"), job.progress.task("loss of English text, untouched model"):
        return untouched_english_loss(
            loaded.model, loaded.tokenizer, loaded.source, job.progress.say
        )


def _measure_english(job: Job, model: Any, untouched: LossSum | None) -> "EnglishLoss | None":
    """Measure English text with the adapter on, if it was before: what is forgotten shows."""
    from swlora.evaluation.english import compare_english, english_loss

    if untouched is None:
        return None
    loss = untouched
    if model is not job.loaded.model:
        with job.timed("english"), job.progress.task("loss of English text"):
            loss = english_loss(model, job.loaded.tokenizer)
    return compare_english(untouched, loss, job.loaded.tokenizer)


def evaluate_adapter(
    job: Job, adapter: Path | None, metric: "UserMetric | None" = None
) -> "Evaluated":
    """Evaluate the adapter in a folder (a run folder will do), or the base model for None."""
    from swlora.adapters.saved import WEIGHTS, adapter_folder, with_adapter

    folder = adapter_folder(adapter) if adapter else None
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
    # In the dtype in which it is trained: a search for super weights may have had another.
    untouched = measure_untouched_english(job)
    with reporting(job) as trackers:
        trained = train(job, training, layers)
        evaluated = evaluate(job, trained.model.eval(), evaluation, untouched, metric)
        trackers.result(evaluated)
    return trained, evaluated
