"""Settings that a configuration leaves open until model and adapter are at hand, and their values.

They are the place and method of an adapter to start from, and the learning rate.
"""

from swlora.config import DEFAULT_RATE, default_rate, sharding_problem
from swlora.errors import UserError
from swlora.job import Job
from swlora.layer_policy import LayerPolicy

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


def settle_rate(job: Job, policy: LayerPolicy | None = None) -> str | None:
    """Give a job without a learning rate that of its method and layers; return a line about it.

    One that is given stays, and gets a line where it is far from that. `policy` stands for another
    one than the job's. Of layers that are found before the training the number is not known: of
    `super` it is taken to be 1. `auto` tries layers, and trains in them, with the rate of all.
    """
    from swlora.models.anatomy import Anatomy

    train, adapter = job.spec.train, job.spec.adapter
    policy, n_layers = policy or adapter.layers, Anatomy(job.loaded.model).n_layers
    if policy.needs_search:
        n_adapted = 1 if policy.needs_identification else n_layers
    else:
        n_adapted = len(policy.resolve(n_layers))
    rate = default_rate(adapter, n_adapted=n_adapted, n_layers=n_layers)
    layers = "all layers" if n_adapted == n_layers else f"{n_adapted} of {n_layers} layers"
    if (given := train.learning_rate) is not None:
        is_far = not 1 / FAR < given / rate < FAR and not job.run.facts.get("resumed")
        default = f"{rate:g}, the default of {adapter.method} in {layers}"
        above = "above" if given > rate else "below"
        return f"learning rate {given:g} is far {above} {default}" if is_far else None
    settled = train.model_copy(update={"learning_rate": rate})
    job.spec = job.spec.model_copy(update={"train": settled})
    if rate == DEFAULT_RATE:
        return None
    return (
        f"learning rate {rate:g}, for {adapter.method} in {layers} (--learning-rate sets another)"
    )
