"""A configuration looked at before anything runs: what is wrong with it, and what it comes to.

Of models the configuration and the tokenizer's files are read, never the weights; of data the rows,
which are encoded as for a training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from swlora.config import RunSpec, rate_trial_problem
from swlora.config.yaml_file import read_mapping
from swlora.errors import UserError
from swlora.layer_policy import layer_ranges
from swlora.plural import counted
from swlora.settings import problem_lines
from swlora.study.check import MANY_STEPS, Checked, check
from swlora.study.overview import PlannedArm, arms_before, plan_of
from swlora.study.spec import rate_name
from swlora.study.study_file import read_studies

Fact = tuple[str, str]


@dataclass
class ConfigCheck:
    """What was found: `kind` is run or study; `problems` are empty where all is well.

    `resolved` says what it comes to, `unchecked` what was not at hand to be looked at.
    """

    file: str
    kind: str
    problems: list[str] = field(default_factory=list)
    resolved: list[Fact] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def check_config(path: Path) -> ConfigCheck:
    """Check a YAML file of a run, or of a study (which has `arms`).

    Raises UserError for a file that cannot be read as a configuration at all.
    """
    tree = read_mapping(path)
    if "arms" in tree:
        return _check_study(path)
    found = ConfigCheck(str(path), "run")
    try:
        spec = RunSpec.model_validate(tree)
    except ValidationError as error:
        found.problems += problem_lines(error, RunSpec)
        return found
    _check_run(found, spec)
    return found


def _check_run(found: ConfigCheck, spec: RunSpec) -> None:
    from swlora.job import Job
    from swlora.models.precision import resolve_device, resolve_dtype
    from swlora.preparation import check_reporting
    from swlora.progress import Silent
    from swlora.run_record import MemoryRecord

    with _noted(found, "train"):
        check_reporting(spec.train, has_folder=True)
    if problem := rate_trial_problem(spec):
        found.problems.append(problem)
    if (text := spec.identify.text) is not None and not text.is_file():
        found.problems.append(f"identify.text: there is no file {text}")
    job = None
    with _noted(found, "adapter.start"):
        job = Job(spec, MemoryRecord(), Silent())
    if job is None:
        return
    with _noted(found, "model"):
        device = resolve_device(spec.model.device)
        dtype = str(resolve_dtype(spec.model.dtype, device)).removeprefix("torch.")
        job.load_skeleton()
        found.resolved += [("model", job.loaded.source), ("computes", f"in {dtype} on {device}")]
    _check_data(found, job)
    if "loaded" in vars(job):
        with _noted(found, "adapter"):
            _check_adapter(found, job)
    train = job.spec.train
    rate = "that of its method and layers" if train.learning_rate is None else f"{train.rate:g}"
    rate = "found by a trial" if train.find_learning_rate and not problem else rate
    found.resolved.append(("learning rate", f"{rate}, {train.schedule}"))


def _check_data(found: ConfigCheck, job: Any) -> None:
    from swlora.data.hub_data import HubUnreachableError
    from swlora.data.sources import load_dataset
    from swlora.training.schedule import begun_epochs, planned_steps, sequences_per_step

    spec = job.spec
    try:
        dataset = job.dataset if "loaded" in vars(job) else load_dataset(spec.data)
    except HubUnreachableError as error:
        found.unchecked.append(f"data: {error}")
        return
    except UserError as error:
        found.problems.append(f"data: {error}")
        return
    n_train, n_dev, n_test = map(len, (dataset.train, dataset.dev, dataset.test))
    rows = f"{n_train:,} to train on, {n_dev:,} dev, {n_test:,} test"
    found.resolved += [("data", dataset.source), ("rows", rows)]
    if not n_train:
        return
    if "loaded" in vars(job):
        _check_rows(found, job)
    train, n_steps = spec.train, planned_steps(spec.train, n_train)
    epochs = counted(begun_epochs(train, n_train), "epoch")
    rows = counted(sequences_per_step(train, n_train), "row")
    found.resolved.append(("steps", f"about {n_steps:,} of {rows} ({epochs})"))


def _check_rows(found: ConfigCheck, job: Any) -> None:
    """Encode the rows as a training does before it begins, and prompts as an evaluation does."""
    from swlora.preparation import encode_held_out, planned_schedule
    from swlora.prepared_evaluation import prepare_evaluation

    n_before = len(found.problems)
    with _noted(found, "data"):
        sequences = job.encoded("train").sequences
        _, planned = planned_schedule(job, sequences, job.progress.say)
        encode_held_out(job, planned)
    if job.dataset.has(job.spec.data.eval_split) and len(found.problems) == n_before:
        with _noted(found, "evaluation"):
            prepare_evaluation(job)


def _check_adapter(found: ConfigCheck, job: Any) -> None:
    """Put the adapter into the model without weights, where its layers are known."""
    from swlora.adapters.methods import check_fit, count_trainable
    from swlora.models.anatomy import Anatomy
    from swlora.open_settings import settle_rate

    adapter, anatomy = job.spec.adapter, Anatomy(job.loaded.model)
    if not adapter.is_settled:
        found.resolved.append(("adapter", f"that in {adapter.start}, trained on"))
        return
    settle_rate(job)
    policy = adapter.layers
    if policy.needs_search:
        check_fit(anatomy, adapter, [0], n_steps=MANY_STEPS)
        found.resolved.append(
            ("adapter", f"{adapter.method} in layers that are searched: {policy}")
        )
        return
    layers = policy.resolve(anatomy.n_layers)
    n = count_trainable(job.loaded.model, adapter, layers, n_steps=MANY_STEPS)
    where = f"{adapter.method} in layers {layer_ranges(layers)} of {anatomy.n_layers}"
    found.resolved.append(("adapter", where if n is None else f"{where}, {n:,} trained weights"))


@contextmanager
def _noted(found: ConfigCheck, section: str) -> Iterator[None]:
    """Note a UserError of the body as a problem of a section."""
    try:
        yield
    except UserError as error:
        found.problems.append(f"{section}: {error}")


def _check_study(path: Path) -> ConfigCheck:
    found = ConfigCheck(str(path), "study")
    files = read_studies(path, {})
    for file in files:
        which = f"{file.name}: " if len(files) > 1 else ""
        found.problems += [which + line for line in file.problems]
        if file.spec is None:
            continue
        checked = check(file.spec, may_fetch=False)
        found.problems += [which + line for line in checked.problems]
        found.unchecked += [which + line for line in checked.unchecked]
        if not found.problems:
            found.resolved += _planned(file.name, checked)
    return found


def _planned(name: str, checked: Checked) -> list[Fact]:
    plan = plan_of(name, checked, [arm.name for arm in arms_before(checked)])
    rows = ", ".join(f"{n:,} {split}" for split, n in plan.n_rows.items())
    runs = counted(plan.n_runs, "run")
    runs += f", {plan.n_short_runs} short ones, {plan.n_beam_runs} with beams"
    facts = [("study", name), ("model", plan.model), ("data", f"{plan.data}; rows: {rows}")]
    return [*facts, *(("arm", _arm(arm)) for arm in plan.arms), ("runs", runs)]


def _arm(arm: PlannedArm) -> str:
    layers = layer_ranges(arm.layers) if arm.layers else arm.policy
    n = "" if arm.n_trainable is None else f", {arm.n_trainable:,} trained weights"
    rates = ", ".join(map(rate_name, arm.rates or ())) or "that follow from the layers"
    return f"{arm.name}: {arm.method}, layers {layers}{n}, learning rates {rates}"
