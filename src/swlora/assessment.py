"""The model of a job evaluated: losses, texts and their scores, and what English text says."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swlora.job import Job
from swlora.loss_sum import LossSum
from swlora.prepared_evaluation import PreparedEvaluation
from swlora.processes import world

if TYPE_CHECKING:
    from swlora.evaluation.evaluated import EnglishLoss, Evaluated
    from swlora.evaluation.scoring import TextsScored
    from swlora.evaluation.user_metrics import UserMetric


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
        losses = dealt_losses(model, sequences, prepared.asked.group_of, job.progress)
    english = _measure_english(job, model, untouched)
    texts = _score(job, model, prepared, losses) if prepared.prompts else None
    path = texts.write(job.run.folder) if texts and job.run.folder else None
    loss = sum(losses, LossSum())
    evaluated = Evaluated(
        scores=texts.statistics.scores() if texts else None,
        text_scores=texts.text_scores() if texts else None,
        has_official=job.dataset.is_e2e or any(len(refs) > 1 for refs in prepared.asked.references),
        nll=loss.nats_per_token,
        nll_per_row=loss.sum_nats / prepared.asked.n_rows,
        n_rows=prepared.asked.n_rows,
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
    own = [losses[group] for group in prepared.asked.groups]
    with job.timed("score"), job.progress.task("score"):
        return score_texts(
            prepared.shown_prompts,
            texts,
            prepared.asked.references,
            own,
            are_all=len(own) == len(losses),
        )


def wants_english(job: Job) -> bool:
    """Say whether the run is to measure English text: if asked, or with E2E data."""
    wanted = job.spec.data.english
    return job.dataset.is_e2e if wanted is None else wanted


def measure_untouched_english(job: Job) -> LossSum | None:
    """Return the base model's loss of English text, None where the run is not to measure it."""
    from swlora.evaluation.english import untouched_english_loss

    loaded = job.loaded
    if not wants_english(job):
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
