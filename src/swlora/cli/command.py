"""What all commands have in common: how they are made, their options, run folder and result."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from swlora.cli.disk import say_what_is_left
from swlora.cli.failure import failure_in_one_line
from swlora.cli.flags import setting_options
from swlora.cli.process import no_library_notes, shown_by_main
from swlora.command_settings import check_processes
from swlora.config import RunSpec, load_spec
from swlora.errors import UserError
from swlora.files import check_writable
from swlora.idle_settings import check_effects
from swlora.interrupts import no_interrupt_lost, sigterm_interrupts
from swlora.processes import world
from swlora.result_json import as_json
from swlora.run_settings import flat

if TYPE_CHECKING:
    from swlora.job import Job
    from swlora.progress import Progress
    from swlora.runs import Run

T = TypeVar("T")


def _output(default: str) -> Any:
    return Annotated[Path | None, typer.Option("--output", help=f"run folder [default: {default}]")]


OUTPUT = {"output": _output("runs/COMMAND-TIME")}
OUTPUT_IF_ASKED = {"output": _output("none")}
RESUME = {
    "resume": Annotated[
        bool,
        typer.Option(
            "--resume",
            help="continue the run in --output; with flags that change it from here on, such as "
            "--learning-rate, or --epochs of one that is done",
        ),
    ],
    "force_resume": Annotated[
        bool,
        typer.Option(
            "--force-resume",
            help="--resume, also where weights, data, tokenizer, settings, versions, device or "
            "dtype are others than before; says which",
        ),
    ],
    "verify": Annotated[
        bool,
        typer.Option(
            "--verify", help="hash the model's files whole, to compare them when the run goes on"
        ),
    ],
}
PROCESSES = {
    "processes": Annotated[
        int | None,
        typer.Option(
            "--processes",
            min=1,
            help="how many torchrun or accelerate are to have started, as in torchrun "
            "--nproc-per-node 2 -m swlora train --processes 2 ...; another number is an error",
        ),
    ]
}
CONFIG = {
    "config": Annotated[
        Path | None, typer.Option("--config", help="YAML with any of these settings; flags win")
    ]
}
JSON = {
    "json": Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="also write the result here, as JSON"),
    ]
}
DEBUG = {"debug": Annotated[bool, typer.Option("--debug", help="show the traceback of a failure")]}


@dataclass
class Invocation:
    """One call of a command: what the options say that it shares with others, and its run.

    `flags` has the values of its settings by their dotted names, None where none was given.
    """

    command: str
    flags: dict[str, Any]
    config: Path | None = None
    output: Path | None = None
    resume: bool = False
    force_resume: bool = False
    verify: bool = False
    processes: int | None = None
    json: Path | None = None
    _run: "Run | None" = None

    @cached_property
    def spec(self) -> RunSpec:
        """The settings of the file and the flags, as one configuration.

        Raises UserError for flags that would do nothing.
        """
        spec = load_spec(self.config, self.flags)
        check_effects(self.command, spec, self._given)
        return spec

    @property
    def _given(self) -> list[str]:
        return [setting for setting, value in self.flags.items() if value is not None]

    @cached_property
    def progress(self) -> "Progress":
        """What shows a person how work goes on."""
        from swlora.cli.terminal import make_progress
        from swlora.progress import Silent

        no_library_notes()
        return make_progress() if world().is_main else Silent()

    @contextmanager
    def job(self) -> Iterator["Job"]:
        """Prepare a run, or reopen the one in --output, and record how it ends.

        The folder is made when the job begins its work: mistakes that show before leave none.
        """
        from swlora.joint_run import joint_run
        from swlora.runs import Run

        with (
            sigterm_interrupts(),
            joint_run(self._open_run, self._asked, self.processes) as (run, spec),
        ):
            from swlora.job import Job

            self._run = run if isinstance(run, Run) else None
            yield Job(spec, run, self.progress, self.verify)

    def dry_job(self) -> "Job":
        """Return a job that begins no run, and writes nothing; it knows where one would write."""
        from swlora.job import Job
        from swlora.run_record import DryRecord
        from swlora.runs import Run

        if self._goes_on:
            raise UserError("--dry-run is for a training that has not begun; leave out --resume")
        folder = Run.prepare(self.output, self.spec, self.command).folder
        return Job(self.spec, DryRecord(folder), self.progress, self.verify)

    def _asked(self) -> dict[str, Any]:
        """Return what several processes of one run must have been given alike."""
        if not self._goes_on:
            return flat(self.spec)
        return {name: as_json(self.flags[name]) for name in self._given}

    @property
    def _goes_on(self) -> bool:
        return self.resume or self.force_resume

    def _open_run(self) -> "tuple[Run, RunSpec]":
        """Prepare a run, or reopen the one in --output."""
        from swlora.runs import Run

        if not self._goes_on:
            return Run.prepare(self.output, self.spec, self.command), self.spec
        flags = {name: self.flags[name] for name in self._given}
        forced = self.progress.say if self.force_resume else None
        return Run.reopen(self._resumed_folder(), self.command, flags, forced)

    def _resumed_folder(self) -> Path:
        """Return --output; UserError where it is missing, or beside a configuration of its own."""
        if self.output is None:
            raise UserError("--resume needs the run's folder: --output DIR")
        if self.config is not None:
            raise UserError(
                "--resume continues with the settings in the run's config.yaml; leave out "
                "--config, and give what shall change as flags"
            )
        return self.output

    def recorded(self, work: Callable[[], T]) -> T:
        """Return what a short command's work does, recorded as a run where --output asks for it."""
        if self.output is None:
            return work()
        with self.job() as job:
            result = work()
            job.record_result(result)
        return result

    def finish(self, result: Any) -> None:
        """Write the result as JSON where it was asked for, and say where the run folder is."""
        from swlora.runs import started_s

        if (run := self._run) is not None:
            print(f"run folder: {run.folder}")
            say_what_is_left(run.folder, started_s(run.facts))
        if self.json is not None and world().is_main:
            from swlora.files import write_json

            write_json(self.json, as_json(result))


def command(
    app: typer.Typer,
    name: str,
    *shared: Mapping[str, Any],
    settings: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of `app` of a verb, a function of an `Invocation` and of its own options.

    shared: options that fill fields of the `Invocation`; --debug is one of every command.
    settings, defaults: see `setting_options`.
    """
    own_of_all = {key: kind for options in shared for key, kind in options.items()}

    def register(verb: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(verb).parameters.values()
        flags = setting_options(settings, defaults or {})

        def run(**values: Any) -> None:
            with failure_in_one_line(debug=values.pop("debug")), no_interrupt_lost():
                check_processes(name)
                given = {path: values.pop(option.name) for path, option in flags.items()}
                common = {key: values.pop(key) for key in own_of_all}
                if (json := common.get("json")) is not None:
                    check_writable(json.parent, "--json")
                with shown_by_main():
                    verb(Invocation(name, given, **common), **values)

        around = [_parameter(*option) for option in (own_of_all | DEBUG).items()]
        options = [*own, *around, *flags.values()]
        as_keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in options]
        run.__signature__ = inspect.Signature(as_keywords)  # type: ignore[attr-defined]
        run.__annotations__ = {option.name: option.annotation for option in options}
        run.__doc__ = verb.__doc__
        app.command(name)(run)
        return verb

    return register


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    default = False if annotation.__origin__ is bool else None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
