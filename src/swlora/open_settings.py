"""Settings that a configuration leaves open until model and adapter are at hand, and their values.

They are the place and method of an adapter to start from, and the learning rate, which is known
after a search for layers or a trial of rates. Then it stands in run.json (`fitted`), and the
configuration leaves it open.
"""

from swlora.config import DEFAULT_RATE, default_rate, rate_trial_problem, sharding_problem
from swlora.errors import UserError
from swlora.job import Job

FAR = 10  # times more or less: at LoRA's rate `full` and LoRA+ were measured to ruin a model


def settle(job: Job) -> list[str]:
    """Fill in what `job.spec` leaves open; return lines about it, to be said when the run begins.

    A run that goes on has all of it in its configuration. Raises UserError where the adapter to
    start from cannot be trained on.
    """
    return [line for line in (settle_start(job), settle_rate(job)) if line]


def settle_start(job: Job) -> str | None:
    """Give a job the settings of the adapter that it starts from; UserError where it cannot."""
    from swlora.adapters.start import check_start_base, settled_start, start_facts
    from swlora.models.anatomy import Anatomy
    from swlora.models.identity import weights_sample_sha256

    given, loaded = job.spec.adapter, job.loaded
    if given.start is None:
        return None
    goes_on = bool(job.run.facts.get("resumed"))
    if goes_on and not given.start.is_dir():
        raise UserError(
            f"the adapter that this training started from is not in {given.start} any more; put it "
            "back, or give its new place beside --resume: --adapter DIR"
        )
    settled = settled_start(given, Anatomy(loaded.model))
    check_start_base(settled, loaded.source, weights_sample_sha256(loaded.model))
    job.run.record_source(**start_facts(settled))
    job.spec = job.spec.model_copy(update={"adapter": settled})
    if problem := sharding_problem(job.spec):
        raise UserError(problem)
    if goes_on:
        return None
    return (
        f"starts from the adapter in {given.start} ({settled.method}, layers {settled.layers}), "
        "with a new optimizer and schedule"
    )


def settle_rate(job: Job) -> str | None:
    """Give a job without a learning rate that of its method and layers; return a line about it.

    One that is given stays, and gets a line where it is far from that. Of layers that are yet to be
    found nothing is known: see `note_found_rate`.
    """
    from swlora.models.anatomy import Anatomy
    from swlora.training.layer_profile import check_trees

    train, policy = job.spec.train, job.spec.adapter.layers
    if train.find_learning_rate:
        check_trees(Anatomy(job.loaded.model), "--find-learning-rate")
        return None
    if policy.needs_search:
        return None
    n_adapted = len(policy.resolve(Anatomy(job.loaded.model).n_layers))
    rate, where = _default_rate(job, n_adapted)
    if train.learning_rate is not None:
        return _far_line(job, rate, where)
    job.spec = job.spec.model_copy(
        update={"train": train.model_copy(update={"learning_rate": rate})}
    )
    return _rate_line(rate, where)


def note_found_rate(job: Job, n_adapted: int) -> str | None:
    """Note the rate of as many layers as were found; return a line about it.

    One that is given, or was noted before, stays.
    """
    rate, where = _default_rate(job, n_adapted)
    if job.spec.train.learning_rate is not None:
        return _far_line(job, rate, where)
    if noted_rate(job) is not None:
        return None
    note_rate(job, rate)
    return _rate_line(rate, where)


def note_rate(job: Job, rate: float) -> None:
    """Note a rate that the configuration leaves open in run.json, beside what else was chosen."""
    job.run.record(fitted={**job.run.facts.get("fitted", {}), "learning_rate": rate})


def noted_rate(job: Job) -> float | None:
    """Return the rate that the run has noted, None for none."""
    rate = job.run.facts.get("fitted", {}).get("learning_rate")
    return None if rate is None else float(rate)


def check_rate_trial(job: Job) -> None:
    """Raise UserError where a new training is to find a rate and cannot; nothing is loaded."""
    if not job.run.facts.get("resumed") and (problem := rate_trial_problem(job.spec)):
        raise UserError(problem)


def _default_rate(job: Job, n_adapted: int) -> tuple[float, str]:
    """Return the rate of a method in so many layers, and both in words."""
    from swlora.models.anatomy import Anatomy

    adapter, n_layers = job.spec.adapter, Anatomy(job.loaded.model).n_layers
    layers = "all layers" if n_adapted == n_layers else f"{n_adapted} of {n_layers} layers"
    rate = default_rate(adapter, n_adapted=n_adapted, n_layers=n_layers)
    return rate, f"{adapter.method} in {layers}"


def _rate_line(rate: float, where: str) -> str | None:
    said = f"learning rate {rate:g}, for {where} (--learning-rate sets another)"
    return None if rate == DEFAULT_RATE else said


def _far_line(job: Job, rate: float, where: str) -> str | None:
    given = job.spec.train.rate
    if 1 / FAR < given / rate < FAR or job.run.facts.get("resumed"):
        return None
    above = "above" if given > rate else "below"
    return f"learning rate {given:g} is far {above} {rate:g}, the default of {where}"
