"""Settings that a configuration leaves open until model and adapter are at hand, and their values.

They are the place and method of an adapter to start from, and the learning rate.
"""

from swlora.config import default_rate, sharding_problem
from swlora.errors import UserError
from swlora.job import Job


def settle(job: Job) -> None:
    """Fill in what `job.spec` leaves open; UserError where that makes no training.

    A run that goes on has all of it in its configuration.
    """
    settle_start(job)
    settle_rate(job)


def settle_start(job: Job) -> None:
    """Give a job the settings of the adapter that it starts from; UserError where it cannot."""
    from swlora.adapters.start import check_start_base, settled_start, start_facts
    from swlora.models.anatomy import Anatomy
    from swlora.models.identity import weights_sample_sha256

    given, loaded = job.spec.adapter, job.loaded
    if given.start is None:
        return
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
    if not goes_on:
        job.progress.say(
            f"starts from the adapter in {given.start} ({settled.method}, layers "
            f"{settled.layers}), with a new optimizer and schedule"
        )


def settle_rate(job: Job) -> None:
    """Give a job without a learning rate that of its method and layers, and say so.

    Of `super` one layer is expected; `auto` measures with the rate of all layers, and keeps it.
    """
    from swlora.models.anatomy import Anatomy

    train, adapter = job.spec.train, job.spec.adapter
    if "learning_rate" in train.model_fields_set:
        return
    n_layers = Anatomy(job.loaded.model).n_layers
    if adapter.layers.needs_identification:
        n_adapted = 1
    elif adapter.layers.needs_search:
        n_adapted = n_layers
    else:
        n_adapted = len(adapter.layers.resolve(n_layers))
    rate = default_rate(adapter.method, n_adapted=n_adapted, n_layers=n_layers)
    if rate != train.learning_rate:
        layers = "all layers" if n_adapted == n_layers else f"{n_adapted} of {n_layers} layers"
        job.progress.say(
            f"learning rate {rate:g}, for {adapter.method} in {layers} (--learning-rate sets "
            "another)"
        )
    train = train.model_copy(update={"learning_rate": rate})
    job.spec = job.spec.model_copy(update={"train": train})
