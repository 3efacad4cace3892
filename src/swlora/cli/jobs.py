"""What verbs have in common around their work: a run folder, progress, signals, the result."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.cli.app import Overrides
from swlora.cli.disk import say_what_is_left
from swlora.config import load_spec
from swlora.errors import UserError
from swlora.settings import flag_name

if TYPE_CHECKING:
    from swlora.job import Job


def progress() -> Any:
    """Return what shows a person how work goes on."""
    from swlora.cli.terminal import make_progress

    no_library_notes()
    return make_progress()


def no_library_notes() -> None:
    """Keep libraries' own bars and notes off the terminal for as long as the process lives."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def open_job(
    command: str,
    output: Path | None,
    config: Path | None,
    overrides: Overrides,
    resume: bool = False,
) -> Iterator["Job"]:
    """Prepare a run of a command, or reopen one, and record how it ends.

    The folder is made when the job begins its work: mistakes that show before leave none.
    """
    from swlora.runs import Run

    if resume:
        if output is None:
            raise UserError("--resume needs the run's folder: --output DIR")
        given = [path for path, value in overrides.items() if value is not None]
        if config is not None or given:
            raise UserError(
                "--resume continues with the settings in the run's config.yaml; "
                f"leave out {'--config' if config else flag_name(given[0])}"
            )
        run, spec = Run.reopen(output, command)
    else:
        spec = load_spec(config, overrides)
        run = Run.prepare(output, spec, command)
    with run, sigterm_interrupts():
        from swlora.job import Job

        yield Job(spec, run, progress())


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, so that it is recorded as cancelled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def quiet_or_job(
    command: str, output: Path | None, config: Path | None, overrides: Overrides
) -> Iterator["Job | None"]:
    """Give short commands a run folder only where one was asked for."""
    if output is not None:
        with open_job(command, output, config, overrides) as job:
            yield job
    else:
        load_spec(config, overrides)
        yield None


def finish(result: dict[str, Any], json: Path | None, job: "Job | None") -> None:
    """Write the result where it was asked for, and say where the run folder is."""
    from swlora.runs import started_s

    if job is not None:
        if not (job.run.folder / "result.json").exists():
            job.run.write_result(result)
        print(f"run folder: {job.run.folder}")
        say_what_is_left(job.run.folder, started_s(job.run.facts))
    if json is not None:
        from swlora.files import write_json

        write_json(json, result)
