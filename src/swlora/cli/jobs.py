"""What verbs have in common around their work: a run folder, progress, signals, the result."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swlora.cli.app import Overrides
from swlora.cli.disk import say_what_is_left
from swlora.cli.flags import flag_name
from swlora.config import load_spec
from swlora.errors import UserError

if TYPE_CHECKING:
    from swlora.pipeline import Job


def progress() -> Any:
    """Return what shows a person how work goes on."""
    from swlora.cli.terminal import make_progress

    quiet_libraries()
    return make_progress()


def quiet_libraries() -> None:
    """Keep libraries' own bars and notes off the terminal."""
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
    """Open a run folder for a command, or reopen it, and record how it ends."""
    from swlora.runs import Run, default_folder

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
        run = Run.create(output or default_folder(command), spec, command)
    with run, sigterm_interrupts():
        from swlora.pipeline import Job

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
