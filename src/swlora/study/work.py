"""What a study's processes do that no verb of the command line does.

    python -m swlora.study.work layers --config FILE --output DIR   find the layers of a policy
    python -m swlora.study.work train --config FILE --output DIR      train, measure held-out loss

Both leave an ordinary run folder. The layers are in result.json as "choice": {policy, layers,
reason}; its seconds (`choose_layers` in run.json) hold no loading. The loss is there as "heldout".
"""

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from swlora import pipeline
from swlora.config import load_spec
from swlora.errors import DivergedError, NoSuperWeightError
from swlora.interrupts import no_interrupt_lost, sigterm_interrupts
from swlora.job import Job
from swlora.progress import Silent
from swlora.runs import Run


def find_layers(job: Job) -> None:
    """Turn the layer policy into numbers, and take the time of doing so.

    That a model has no super weight is an answer too: no layers, and the reason.
    """
    for split in ("train", job.spec.data.eval_split):  # loaded before the clock runs
        job.dataset.split(split)
    assert job.loaded
    layers: list[int] = []
    reason = None
    with job.timed("choose_layers"):
        try:
            layers = pipeline.choose_layers(job)
        except NoSuperWeightError as error:
            reason = str(error)
    choice = {"policy": str(job.spec.adapter.layers), "layers": layers, "reason": reason}
    job.run.write_result({"choice": choice})


def train_and_measure(job: Job) -> None:
    """Train, measure the loss on the held-out rows of `data.eval_split`, drop the adapter.

    Raises DivergedError where the loss is no finite number.
    """
    from swlora.evaluation.loss import dataset_loss

    trained = pipeline.train(job)
    with job.timed("loss"):
        held_out = job.encoded(job.spec.data.eval_split).sequences
        loss = dataset_loss(trained.model.eval(), held_out, job.progress)
    if not math.isfinite(loss.sum_nats):  # the last step went too far; no step followed to see it
        raise DivergedError("the loss on held-out rows is not finite after the training")
    values = {"nll": loss.nats_per_token, "sum_nats": loss.sum_nats, "n_tokens": loss.n_tokens}
    assert trained.adapter is not None
    shutil.rmtree(trained.adapter)  # of full training it is as large as the model
    if job.run.checkpoint is not None:  # nobody goes on with it
        shutil.rmtree(job.run.checkpoint, ignore_errors=True)
    job.run.write_result({"train": replace(trained, adapter=None), "heldout": values})


WORK = {"layers": find_layers, "train": train_and_measure}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do one piece of work in a run folder; how it ended is in its run.json."""
    parser = argparse.ArgumentParser(prog="python -m swlora.study.work", description=__doc__)
    parser.add_argument("work", choices=list(WORK))
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    spec = load_spec(given.config, {})
    with (
        sigterm_interrupts(),
        no_interrupt_lost(),
        Run.create(given.output, spec, given.work) as run,
    ):
        WORK[given.work](Job(spec, run, Silent()))


if __name__ == "__main__":
    main()
