"""What a training tells while it is under way, besides its progress: to trackers, and samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swlora.errors import RunFailedError
from swlora.job import Job
from swlora.open_settings import noted_rate
from swlora.processes import world
from swlora.run_settings import flat
from swlora.samples_file import Sample, add_samples
from swlora.trackers import Trackers

if TYPE_CHECKING:
    from swlora.adapters.card import Facts
    from swlora.evaluation.samples import Sampler


@contextmanager
def reporting(job: Job) -> Iterator[Trackers]:
    """Send the reports of a job's training to the trackers that it asks for, until the body ends.

    In a body of another `reporting`, that one's trackers are used. Of several processes the first
    one alone reports.
    """
    if job.trackers is not None:
        yield job.trackers
        return
    names = job.spec.train.report_to if world().is_main else []
    settings = flat(job.spec)
    if settings["train.learning_rate"] is None:
        settings["train.learning_rate"] = noted_rate(job)
    trackers = Trackers(names, job.run, job.spec.train.project, settings, job.progress.say)
    callbacks, job.trackers = job.callbacks, trackers
    if names:
        job.callbacks = (lambda report: trackers.report(report.metrics), *callbacks)
    try:
        yield trackers
    finally:
        job.callbacks, job.trackers = callbacks, None
        trackers.close()


def sampler_of(job: Job, facts: "Facts") -> "Sampler | None":
    """Return what generates while the training is under way, if that is asked for.

    `facts` are those of the adapter. What it generates goes to the terminal, the run folder and the
    trackers.
    """
    from swlora.evaluation.samples import make_sampler, shown

    def take(samples: list[Sample]) -> None:
        if not world().is_main:
            return
        for line in shown(samples):
            job.progress.say(line)
        if folder := job.run.folder:
            try:
                add_samples(folder, samples)
            except OSError as error:
                raise RunFailedError(f"cannot write samples: {error.strerror or error}") from error
        if job.trackers is not None:
            job.trackers.texts([f"{s.prompt}\n\n{s.text}" for s in samples], samples[0].step)

    is_chat, separator = bool(facts.get("is_chat")), facts.get("separator", "")
    train = job.spec.train
    return make_sampler(job.loaded, train, is_chat=is_chat, separator=separator, take=take)
