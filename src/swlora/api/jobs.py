"""Work that takes its time: find super weights, train, evaluate, compare."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from swlora.api.at_hand import model_at_hand
from swlora.api.call import Call, PathLike, ShowProgress, path_of, takes_settings
from swlora.api.settings import EvalSettings, IdentifySettings, TrainSettings
from swlora.command_settings import check_processes
from swlora.errors import UserError
from swlora.training.callbacks import Callback, as_callbacks

if TYPE_CHECKING:
    from swlora.evaluation.evaluated import Evaluated
    from swlora.models.load import LoadedModel
    from swlora.study.compared import Compared, ComparedModels
    from swlora.superweights.findings import Identified
    from swlora.training.trained import Trained


@takes_settings("identify")
def identify(
    *,
    figure: PathLike | None = None,
    adapter: PathLike | None = None,
    output: PathLike | None = None,
    config: PathLike | None = None,
    progress: ShowProgress = None,
    **settings: Unpack[IdentifySettings],
) -> "Identified":
    """Find super weights and prove each by setting it to zero, as `swlora identify` does.

    `figure` is a PNG, SVG or PDF to draw, with or without a run folder (`output`). Of the result,
    `layers` are those with a verified super weight, `perplexity` is exp of nats a token; with an
    `adapter` (a folder) `fine_tuned` says what is otherwise with it. The search is that of arXiv
    2411.07191, the proof our own: perplexity without the weight beside that without random weights
    of like size. Weights are measured in float32.

    Raises UserError for a setting that the command does not take, or that has no such value, and
    for an adapter that cannot be added to the model's weights.

    Examples:
        >>> import swlora
        >>> found = swlora.identify(
        ...     model="builtin", prompt="Apple", windows=1, window_tokens=32, controls=2
        ... )
        >>> all(layer in range(30) for layer in found.layers)
        True
    """
    with Call.of("identify", config, settings).job(output, progress) as job:
        from swlora import pipeline

        return pipeline.identify(job, path_of(figure), path_of(adapter))


@takes_settings("train")
def train(
    *,
    output: PathLike | None = None,
    resume: bool = False,
    force_resume: bool = False,
    verify: bool = False,
    callbacks: Callback | Sequence[Callback] | None = None,
    config: PathLike | None = None,
    progress: ShowProgress = None,
    **settings: Unpack[TrainSettings],
) -> "Trained":
    """Train an adapter, as `swlora train` does; the result's `model` is the PeftModel.

    `output` is the run folder; without one nothing is saved, and there is no checkpoint to go on
    from. `resume` continues the run that lies there, with settings that change it from here on;
    `force_resume` also where weights, data, versions, device or dtype are others; `verify` hashes
    the model's files whole. `callbacks` are called with a `StepReport` after each step, in the
    first of several processes; its `stop()` ends the training, with the adapter saved. What a
    callback raises ends the training too, behind a checkpoint. Of the result, `course` has the
    losses, in nats a trained token, and `loaded` is the model for `generate`. Gradients are those
    of transformers with PEFT (docs/one-step.md says how); LoRA is arXiv 2106.09685.

    Raises UserError for what cannot be trained, RunFailedError where it cannot be finished, and
    DivergedError where the loss is no number any more.

    Examples:
        >>> import swlora
        >>> losses = []
        >>> trained = swlora.train(
        ...     model="builtin", dataset="sample", train_rows=40, batch_size=8, max_steps=3,
        ...     layers="last:1", output="runs/mine",
        ...     callbacks=lambda step: losses.append(step.loss),
        ... )
        >>> trained.course.steps, len(losses), trained.adapter.name
        (3, 3, 'adapter')
        >>> swlora.train(output="runs/mine", resume=True, max_steps=4).course.steps
        4
    """
    call, called = Call.of("train", config, settings), as_callbacks(callbacks)
    how = {"resume": resume, "force_resume": force_resume, "verify": verify}
    with call.job(output, progress, **how) as job:
        from swlora import pipeline

        job.callbacks = called
        trained = pipeline.train(job)
    trained.model.eval()
    return trained


@takes_settings("eval")
def evaluate(
    adapter: PathLike | None = None,
    *,
    model: "PathLike | LoadedModel | None" = None,
    output: PathLike | None = None,
    metrics: Callable[[list[str], list[list[str]]], Any] | None = None,
    config: PathLike | None = None,
    progress: ShowProgress = None,
    **settings: Unpack[EvalSettings],
) -> "Evaluated":
    """Generate for every prompt and score, as `swlora eval` does.

    `adapter` is a folder (a run folder will do); None is the base model. `model` may be one that
    `load` or `train` made (`trained.loaded`), which saves loading it again; its adapter is on it
    then. `metrics` is a function of the texts and of the references of each, that returns a number,
    or numbers by name. Of the result, `nll` is in nats a trained token, `scores` are those of the
    E2E script (BLEU, METEOR and ROUGE-L from 0 to 1), `text_scores` those of any text, and `texts`
    the texts and references.

    Raises UserError for what cannot be evaluated, and for settings of a model beside one that is
    loaded. Where `metrics` fails, the error
    (`swlora.evaluation.user_metrics.MetricError`) has all the rest as its `evaluated`.

    Examples:
        >>> import swlora
        >>> found = swlora.evaluate(
        ...     model="builtin", dataset="sample", eval_prompts=2, max_new_tokens=4, english=False,
        ...     metrics=lambda texts, references: len(texts),
        ... )
        >>> found.n_prompts, found.nll > 0, found.own
        (2, True, {'<lambda>': 2.0})
        >>> loaded = swlora.load(model="builtin")
        >>> again = swlora.evaluate(
        ...     model=loaded, dataset="sample", eval_prompts=2, max_new_tokens=4, english=False
        ... )
        >>> again.nll == found.nll
        True
    """
    metric = None
    if metrics is not None and not callable(metrics):
        raise UserError(
            "metrics is a function of texts and references, not "
            f"{type(metrics).__name__}; --metrics FILE.py:function is of the command line"
        )
    if metrics is not None:
        from swlora.evaluation.user_metrics import UserMetric

        metric = UserMetric(getattr(metrics, "__name__", type(metrics).__name__), metrics)
    loaded = model_at_hand(model, settings, adapter)
    call = Call.of("eval", config, {**settings, "model": None if loaded else model}, loaded)
    with call.job(output, progress) as job:
        from swlora import pipeline

        if loaded is not None:
            return pipeline.evaluate_loaded(job, loaded, metric)
        return pipeline.evaluate_adapter(job, path_of(adapter), metric)


def compare(
    config: PathLike,
    *,
    output: PathLike | None = None,
    only: Sequence[str] | None = None,
    controls: bool | None = None,
) -> "Compared | ComparedModels":
    """Compare methods and layers as the study in a YAML file says, as `swlora compare` does.

    Returns what results.json holds; of a file with several models, that of each. `only` names the
    arms to run, `controls` False leaves out those for comparison. Every run is a process with a
    folder of its own: without `output` they are temporary, and a study that was interrupted cannot
    go on.

    Raises UserError with all problems of the file, and where runs failed
    `swlora.study.compare.NotDoneError`, which has what came out as its `compared`.

    Examples:
        >>> import swlora
        >>> swlora.compare("no-such-study.yaml")
        Traceback (most recent call last):
        swlora.errors.UserError: there is no file no-such-study.yaml
    """
    from swlora.study.compare import NotDoneError, Request, compare

    check_processes("compare")
    with tempfile.TemporaryDirectory(prefix="swlora-") as scratch:
        folder = path_of(output) or Path(scratch) / "study"
        names = None if only is None else list(only)
        try:
            return compare(Request(path_of(config), folder, names, {"controls": controls}))
        except NotDoneError as error:
            if output is not None:
                raise
            where = "the error's `compared` has what is done; a study with an output= can go on"
            raise NotDoneError(error.not_done, where, error.compared) from None
