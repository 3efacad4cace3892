"""swlora in Python: the functions behind `swlora.train` and its like, one for each command.

Settings are keyword arguments with the names of the command line's flags (`batch_size` for
--batch-size), and mean the same. Without `output` there is no run folder, and nothing is written
but a `figure` that was asked for and what lies in the cache folder; progress is not shown unless a
`Progress` is given.
"""

import difflib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from swlora import pipeline
from swlora.adapters.saved import adapter_folder, with_adapter
from swlora.command_settings import MODEL, SETTINGS, check_processes
from swlora.config import RunSpec, load_spec
from swlora.deploy.merge import Merged, MergeRequest
from swlora.deploy.merge import merge as merge_adapter
from swlora.deploy.merged_folder import DTYPES
from swlora.errors import UserError
from swlora.evaluation.evaluated import Evaluated
from swlora.evaluation.prompting import Generated, Prompt, generate_text
from swlora.evaluation.user_metrics import UserMetric
from swlora.job import Job
from swlora.joint_run import joint_run
from swlora.models.load import LoadedModel, load_model
from swlora.processes import world
from swlora.progress import Progress, Silent
from swlora.run_record import MemoryRecord, RunRecord
from swlora.run_settings import flat
from swlora.runs import Run
from swlora.settings import flag_name
from swlora.study.compared import Compared, ComparedModels
from swlora.superweights.findings import Identified
from swlora.training.callbacks import Callback, as_callbacks
from swlora.training.trained import Trained

PathLike = str | os.PathLike[str]


def identify(
    *,
    figure: PathLike | None = None,
    adapter: PathLike | None = None,
    output: PathLike | None = None,
    config: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Identified:
    """Find super weights and prove each by setting it to zero, as `swlora identify` does.

    `figure` is a PNG, SVG or PDF to draw, with or without a run folder. With an `adapter` (a
    folder) the result's `fine_tuned` says what is otherwise with it.
    Raises UserError for a setting that is not one of that command, or has no such value, and for
    an adapter that cannot be added to the model's weights.
    """
    spec = _spec("identify", config, settings)
    with _job("identify", spec, output, progress) as job:
        return pipeline.identify(job, _path(figure), _path(adapter))


def train(
    *,
    output: PathLike | None = None,
    callbacks: Callback | Sequence[Callback] | None = None,
    config: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Trained:
    """Train an adapter, as `swlora train` does; the result's `model` is the PeftModel.

    Without `output` nothing is saved, and there is no checkpoint to resume from. `callbacks` are
    called with a `StepReport` after each step, in the first of several processes; its `stop()`
    ends the training, with the adapter saved. What a callback raises ends the training too, behind
    a checkpoint. Raises UserError for what cannot be trained, and DivergedError where the loss is
    no number any more.
    """
    spec, called = _spec("train", config, settings), as_callbacks(callbacks)
    with _job("train", spec, output, progress) as job:
        job.callbacks = called
        trained = pipeline.train(job)
    trained.model.eval()
    return trained


def evaluate(
    adapter: PathLike | None = None,
    *,
    output: PathLike | None = None,
    metrics: Callable[[list[str], list[list[str]]], Any] | None = None,
    config: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Evaluated:
    """Generate for every prompt and score, as `swlora eval` does.

    `adapter` is a folder (a run folder will do); None is the base model. `metrics` is a function of
    the texts and of the references of each, that returns a number, or numbers by name. Where it
    fails, the UserError (`swlora.evaluation.user_metrics.MetricError`) has all the rest as its
    `evaluated`: nothing that was generated is lost. `evaluated.texts` are the texts and references.
    """
    spec = _spec("eval", config, settings)
    name = getattr(metrics, "__name__", type(metrics).__name__)
    metric = None if metrics is None else UserMetric(name, metrics)
    with _job("eval", spec, output, progress) as job:
        return pipeline.evaluate_adapter(job, _path(adapter), metric)


def compare(
    config: PathLike,
    *,
    output: PathLike | None = None,
    only: Sequence[str] | None = None,
    controls: bool | None = None,
) -> Compared | ComparedModels:
    """Compare methods and layers as the study in a YAML file says, as `swlora compare` does.

    Returns what results.json holds; of a file with several models, that of each. Every run is a
    process with a folder of its own: without `output` they are temporary, and a study that was
    interrupted cannot go on.
    """
    from swlora.study.compare import Request, compare

    check_processes("compare")
    with tempfile.TemporaryDirectory(prefix="swlora-") as scratch:
        folder = _path(output) or Path(scratch) / "study"
        names = None if only is None else list(only)
        return compare(Request(Path(config), folder, names, {"controls": controls}))


def generate(
    prompt: str,
    *,
    adapter: PathLike | None = None,
    chat: bool | None = None,
    system: str | None = None,
    output: PathLike | None = None,
    config: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Generated:
    """Continue a prompt, or answer it (`chat`), as `swlora generate` does."""
    spec = _spec("generate", config, settings)
    with _job("generate", spec, output, progress) as job:
        asked = Prompt(prompt, chat, system)
        generated = generate_text(spec, asked, _path(adapter), job.progress)
        job.record_result(generated)
    return generated


def load(
    adapter: PathLike | None = None,
    *,
    config: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> LoadedModel:
    """Load a model and its tokenizer, with the adapter in a folder on it if one is named."""
    progress, folder = progress or Silent(), _path(adapter)
    folder = adapter_folder(folder) if folder else None
    loaded = load_model(_spec("load", config, settings).model)
    return loaded if folder is None else with_adapter(loaded, folder, progress.say)


def merge(
    adapter: PathLike,
    output: PathLike,
    *,
    dtype: str | None = None,
    shard_gb: float = 5.0,
    force: bool = False,
    config: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Merged:
    """Add an adapter to its base's weights and check the result, as `swlora merge` does.

    `output` is the folder of the merged model, new or empty. Without `model` the base is the one
    that the adapter was trained on.
    """
    check_processes("merge")
    model = _spec("merge", config, settings).model
    if dtype not in (None, *DTYPES):
        raise UserError(f"merge takes no dtype {dtype!r}; it takes {', '.join(DTYPES)}")
    request = MergeRequest(Path(adapter), Path(output), model, dtype, shard_gb, force)
    return merge_adapter(request, progress or Silent())


@contextmanager
def _job(
    command: str, spec: RunSpec, output: PathLike | None, progress: Progress | None
) -> Iterator[Job]:
    """Make a job with a run folder, or with none."""
    check_processes(command)

    def opened() -> tuple[AbstractContextManager[RunRecord], RunSpec]:
        if output is None:
            return nullcontext(MemoryRecord()), spec
        return Run.prepare(Path(output), spec, command), spec

    with joint_run(opened, lambda: flat(spec)) as (run, own_spec):
        yield Job(own_spec, run, (world().is_main and progress) or Silent())


def _spec(command: str, config: PathLike | None, settings: dict[str, Any]) -> RunSpec:
    """Build the configuration from a YAML file and keyword arguments.

    Raises UserError for names that the command does not take, with the nearest that it does.
    """
    names = {keyword(path): path for path in (MODEL if command == "load" else SETTINGS[command])}
    for name in sorted(settings.keys() - names.keys()):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (do you mean {near[0]}?)" if near else ""
        raise UserError(f"{command} takes no setting {name!r}{hint}")
    return load_spec(_path(config), {names[name]: _plain(v) for name, v in settings.items()})


def keyword(path: str) -> str:
    """Return the keyword argument of a setting, such as dataset for data.name."""
    return flag_name(path).removeprefix("--").replace("-", "_")


def _path(given: PathLike | None) -> Path | None:
    return None if given is None else Path(given)


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
