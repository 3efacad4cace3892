"""identify -> choose layers -> train -> evaluate, for one configuration in one run folder.

The command line, the studies and the web page all call these functions and nothing below them.
Each writes what it found into the run folder and returns the same as a dict of plain values.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.data.examples import Example
from swlora.data.token_sequences import TokenSequences
from swlora.job import Job
from swlora.layer_policy import VerifiedLayers, layer_ranges
from swlora.loss_sum import LossSum
from swlora.memory import peak_memory_bytes
from swlora.models.identity import identify_base, weights_sample_sha256
from swlora.runs import read_metrics

if TYPE_CHECKING:
    from swlora.evaluation.evaluated import EnglishLoss, Evaluated
    from swlora.evaluation.held_out import Measurements
    from swlora.superweights.findings import Identified
    from swlora.training.schedule import Schedule
    from swlora.training.trained import Trained


def identify(job: Job, figure: Path | None = None) -> "Identified":
    """Find super weights, prove each by ablation, write report and figures; return the findings.

    `layers` in the result are those of candidates whose ablation proved them. Leaves
    superweights.md and its figures in the run folder; `figure` names another place for the scan.
    """
    from swlora.superweights import identify as identification
    from swlora.superweights.figure import check_format
    from swlora.superweights.report import publish

    if figure is not None:
        check_format(figure)
    spec, loaded = job.spec, job.loaded
    identification.check(loaded, spec.identify)
    job.begin()
    figure = figure or job.run.folder / "superweights.png"
    with job.timed("identify"):
        found = identification.identify(
            loaded, spec.identify, seed=spec.seed, progress=job.progress
        )
        result = publish(found, job.run.folder, figure)
    job.run.write_result({"identify": result})
    return result


def train(
    job: Job, prepared: "Prepared | None" = None, layers: list[int] | None = None
) -> "Trained":
    """Train the adapter of `job.spec`; return the adapted model and what was done.

    `prepared` and `layers` are what `prepare_training` and `choose_layers` gave, if asked before.
    Leaves adapter/ (a standard PEFT adapter), metrics.jsonl and loss.png in the run folder, and
    best/ where held-out losses were asked for: the adapter with the lowest.
    """
    import torch

    from swlora.adapters.card import last_losses, training_facts
    from swlora.adapters.methods import adapt, train_mode
    from swlora.adapters.saved import save_adapter
    from swlora.evaluation.held_out import watch_of
    from swlora.evaluation.loss_curve import course_of, draw_loss
    from swlora.training.loop import train as run_loop
    from swlora.training.step import make_step
    from swlora.training.trained import Trained

    spec, prepared = job.spec, prepared or prepare_training(job)  # before a search, which is long
    sequences, schedule, planned = prepared.sequences, prepared.schedule, prepared.planned
    loaded, layers = job.loaded, layers or choose_layers(job)
    with job.timed("attach"):
        resolved = spec.model_copy(update={"train": schedule.spec})
        facts = training_facts(resolved, identify_base(loaded), job.dataset, layers)
        adapted = adapt(
            loaded.model, spec.adapter, layers, seed=spec.seed, n_steps=schedule.n_steps
        )
    model = adapted.model
    train_mode(model)
    n_trainable = sum(p.numel() for p in adapted.parameters.values())
    job.progress.say(
        f"training {n_trainable:,} weights ({spec.adapter.method}) in layers "
        f"{layer_ranges(layers)} on {len(sequences):,} rows"
    )

    def save(folder: Path, losses_nats: dict[str, float], **more: Any) -> int:
        noted = {**facts, "losses_nats_per_token": losses_nats, **more}
        return save_adapter(model, folder, noted, loaded.tokenizer)

    watch = None
    if planned and prepared.held_out:
        watch = watch_of(adapted, prepared.held_out, planned, save, job.run.folder / "best")
    with job.timed("prepare"):
        ready = make_step(model, sequences, spec.train, job.progress.say)
    with closing(ready) as step:
        torch.manual_seed(spec.seed)  # dropout
        with job.timed("train"):
            state = run_loop(step, schedule, adapted, job.run, job.progress, watch)
    adapted.finish()
    metrics = read_metrics(job.run.folder)
    folder = job.run.folder / "adapter"
    adapter_bytes = save(folder, last_losses(metrics))
    draw_loss(metrics, job.run.folder / "loss.png")
    trained = Trained(
        model,
        method=spec.adapter.method,
        layers=layers,
        n_trainable=n_trainable,
        adapter_bytes=adapter_bytes,
        course=course_of(state, schedule, metrics),
        peak_memory_bytes=peak_memory_bytes(model.device.type),
        adapter=folder,
        loss_figure=job.run.folder / "loss.png",
        rank_pattern=adapted.ranks,
        best_adapter=watch.best_folder if watch else None,
    )
    job.run.write_result({"train": trained})
    return trained


@dataclass(frozen=True)
class Prepared:
    """What a training begins with: its rows and steps, and what is measured on which other rows."""

    sequences: TokenSequences
    schedule: "Schedule"
    planned: "Measurements | None"
    held_out: TokenSequences | None


def prepare_training(job: Job) -> Prepared:
    """Load, encode and check what a training needs, then begin the run."""
    from swlora.evaluation.held_out import planned_measurements
    from swlora.training.schedule import Schedule, batch_note

    spec, sequences = job.spec, job.encoded("train")
    schedule = Schedule.of(sequences, spec.train, spec.seed)
    if note := batch_note(spec.train, len(sequences)):
        job.progress.say(note)
    planned = planned_measurements(spec.train, n_steps=schedule.n_steps, n_rows=schedule.n_rows)
    held_out = held_out_rows(job, planned) if planned else None
    check_adapter(job, schedule.n_steps)
    job.begin()
    return Prepared(sequences, schedule, planned, held_out)


def held_out_rows(job: Job, planned: "Measurements") -> TokenSequences | None:
    """Return the rows whose loss is measured while training; None where nobody asked for any."""
    split = job.spec.data.eval_split
    if not planned.is_asked and not len(job.dataset.dev if split == "dev" else job.dataset.test):
        job.progress.say(f"the data set has no {split} split, so no held-out loss is measured")
        return None
    if split == "test" and job.spec.train.early_stopping:
        job.progress.say(
            "early stopping looks at the test rows, so that scores on them will flatter; "
            "--split dev leaves them unseen"
        )
    return job.encoded(split, planned.n_rows)


def check_adapter(job: Job, n_steps: int) -> None:
    """Refuse an adapter that cannot be trained in this model, before any work is done."""
    from swlora.adapters.methods import check_fit
    from swlora.models.anatomy import Anatomy
    from swlora.superweights import identify as identification
    from swlora.training import layer_choice

    spec, anatomy = job.spec, Anatomy(job.loaded.model)
    policy = spec.adapter.layers
    if policy.needs_identification:
        identification.check(job.loaded, spec.identify)
    elif policy.time_budget is not None:
        layer_choice.check_family(anatomy)
    # The first layer stands for layers that are not found yet.
    layers = [0] if policy.needs_search else policy.resolve(anatomy.n_layers)
    check_fit(anatomy, spec.adapter, layers, n_steps=n_steps)


def choose_layers(job: Job) -> list[int]:
    """Turn the layer policy into layer numbers, by whatever search or measurement it needs."""
    from swlora.models.anatomy import Anatomy
    from swlora.models.precision import cast_parameters, resolve_dtype

    policy, model = job.spec.adapter.layers, job.loaded.model
    if policy.time_budget is not None:
        return measure_layers(job, policy.time_budget)
    verified = None
    if policy.needs_identification:
        result = identify(job)
        verified = VerifiedLayers(result.layers, result.removal_layers)
        cast_parameters(model, resolve_dtype(job.spec.model.dtype, model.device.type))
    return policy.resolve(Anatomy(model).n_layers, verified)


def measure_layers(job: Job, budget: float) -> list[int]:
    """Choose the layers of `auto:BUDGET` by a short measurement, and say why.

    A resumed run keeps its layers: a stopwatch would not choose the same ones every time.
    """
    from swlora.training import layer_choice

    if recorded := job.run.read_result().get("layer_choice"):
        return [int(layer) for layer in recorded["layers"]]
    sequences, model = job.encoded("train"), job.loaded.model
    with job.timed("measure_layers"), job.progress.task("measure the layers"):
        choice = layer_choice.choose(model, sequences, job.spec, budget, job.progress)
    for line in layer_choice.lines(choice):
        job.progress.say(line)
    job.run.write_result({"layer_choice": choice})
    return choice.layers


def evaluate(job: Job, model: Any, untouched: LossSum | None) -> "Evaluated":
    """Generate once for every distinct prompt, score with all references, measure the losses.

    `untouched` is what `untouched_english` gave for the base model before it was adapted.
    Leaves predictions.csv, segments.json (what was measured of each prompt) and result.json in the
    run folder.
    """
    from swlora.data.sources import number_prompts
    from swlora.evaluation.decode import chat_end_token_ids, generate
    from swlora.evaluation.evaluated import Evaluated
    from swlora.evaluation.loss import grouped_losses
    from swlora.evaluation.report import write_predictions
    from swlora.evaluation.scores import segment_statistics
    from swlora.evaluation.segments import Segments

    spec, split, tokenizer = job.spec, job.spec.data.eval_split, job.loaded.tokenizer
    examples, references, prompts = evaluation_rows(job)
    sequences, prompt_of = job.encoded(split), number_prompts(job.dataset.split(split))
    with job.timed("loss"):
        losses = grouped_losses(model, sequences, prompt_of, job.progress)
    english = _english_text(job, model, untouched)
    with job.timed("generate"):
        is_chat = any(example.messages for example in examples)
        ends = chat_end_token_ids(job.loaded) if is_chat else job.loaded.end_token_ids
        texts = generate(
            model, tokenizer, prompts, spec.decode, job.progress, end_token_ids=ends, seed=spec.seed
        )
    predictions = [" ".join(text.split()) for text in texts]
    with job.timed("score"), job.progress.task("score"):
        statistics = segment_statistics(predictions, references)
    path = job.run.folder / "predictions.csv"
    write_predictions(path, [_prompt_text(e) for e in examples], predictions, references)
    segments = Segments.of(statistics, losses)
    segments.write(job.run.folder)
    loss = sum(losses, LossSum())
    evaluated = Evaluated(
        scores=statistics.scores(),
        nll=loss.nats_per_token,
        nll_sum_nats=loss.sum_nats,
        n_tokens=loss.n_tokens,
        intervals=segments.intervals(),
        english=english,
        n_prompts=len(prompts),
        split=split,
        decode=spec.decode,
        data=job.dataset.source,
        predictions=path,
    )
    job.run.write_result({"eval": evaluated})
    return evaluated


def untouched_english(job: Job) -> LossSum | None:
    """Return the base model's loss of English text, None where the run is not to measure it."""
    from swlora.evaluation.english import untouched_english_loss

    wanted, loaded = job.spec.data.english, job.loaded
    if not (job.dataset.is_e2e if wanted is None else wanted):
        return None
    with job.timed("english"), job.progress.task("loss of English text, untouched model"):
        return untouched_english_loss(
            loaded.model, loaded.tokenizer, loaded.source, job.progress.say
        )


def _english_text(job: Job, model: Any, untouched: LossSum | None) -> "EnglishLoss | None":
    """Measure English text with the adapter on, if it was before: what is forgotten shows."""
    from swlora.evaluation.english import compare_english, english_loss

    if untouched is None:
        return None
    loss = untouched
    if model is not job.loaded.model:
        with job.timed("english"), job.progress.task("loss of English text"):
            loss = english_loss(model, job.loaded.tokenizer)
    return compare_english(untouched, loss, job.loaded.tokenizer)


def evaluation_rows(job: Job) -> tuple[list[Example], list[list[str]], list[list[int]]]:
    """Return the distinct prompts to generate for, their references and their token ids.

    Raises UserError where there are none, or where the model has no room for an answer.
    """
    from swlora.data.encode import encode_prompts
    from swlora.data.known_tokens import check_prompts
    from swlora.data.sources import group_references
    from swlora.evaluation.decode import check_room
    from swlora.models.anatomy import n_embeddings

    groups = group_references(job.dataset.split(job.spec.data.eval_split))
    examples = [example for example, _ in groups]
    prompts = encode_prompts(examples, job.dataset.separator, job.loaded.tokenizer)
    check_prompts(prompts, job.loaded.tokenizer, n_embeddings(job.loaded.model))
    check_room(job.loaded.model, prompts, job.spec.decode)
    return examples, [references for _, references in groups], prompts


def evaluate_adapter(job: Job, adapter: Path | None) -> "Evaluated":
    """Evaluate the adapter in a folder (a run folder will do), or the base model for None."""
    from swlora.adapters.saved import adapter_folder, load_adapter, warn_of_other_base

    folder = adapter_folder(adapter) if adapter else None
    job.dataset.split(job.spec.data.eval_split)  # mistyped names shall not cost a model's loading
    model = job.loaded.model
    evaluation_rows(job)
    job.encoded(job.spec.data.eval_split)
    untouched = untouched_english(job)
    if folder:
        job.run.record(adapter=str(adapter))
        sample = weights_sample_sha256(model)
        warn_of_other_base(folder, job.loaded.source, sample, job.progress.say)
        model = load_adapter(model, folder)
    job.begin()
    return evaluate(job, model, untouched)


def train_evaluate(job: Job) -> "tuple[Trained, Evaluated]":
    """Train, then evaluate what was trained, in one run folder."""
    evaluation_rows(job)  # what cannot be evaluated shall be known before the training
    prepared, layers = prepare_training(job), choose_layers(job)
    untouched = untouched_english(job)  # in the dtype in which it is trained, also after a search
    trained = train(job, prepared, layers)
    return trained, evaluate(job, trained.model.eval(), untouched)


def _prompt_text(example: Example) -> str:
    """Return the prompt for a person to read: its text, or a chat's turns."""
    turns = (f"{role}: {content}" for role, content in example.messages)
    return example.prompt or "\n".join(turns)
