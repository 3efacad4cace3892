"""From keyword arguments to a configuration, and to a job that works by it."""

import difflib
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from swlora.api.at_hand import spec_at_hand
from swlora.api.bars import shown
from swlora.command_settings import MODEL, SETTINGS, check_processes, keyword, setting_field
from swlora.config import RunSpec, load_spec
from swlora.errors import UserError
from swlora.idle_settings import check_effects
from swlora.joint_run import joint_run
from swlora.paths import expanded
from swlora.processes import world
from swlora.progress import Progress, Silent
from swlora.result_json import as_json
from swlora.run_record import MemoryRecord, RunRecord
from swlora.run_settings import flat
from swlora.runs import Run

if TYPE_CHECKING:
    from swlora.job import Job
    from swlora.models.load import LoadedModel

PathLike = str | os.PathLike[str]
ShowProgress = Progress | bool | None
F = TypeVar("F", bound=Callable[..., Any])

TAKEN = {**SETTINGS, "load": MODEL}  # by the functions, under the commands' names


def takes_settings(command: str) -> Callable[[F], F]:
    """Let a function show the settings of a command among its parameters, for completion and help.

    Type checkers see them as the TypedDict of its **settings.
    """

    def shows(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = {keyword(path): setting_field(path) for path in TAKEN[command]}
        settings = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.get_default(call_default_factory=True),
            )
            for name, field in named.items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*own, *settings])  # type: ignore[attr-defined]
        return function

    return shows


@dataclass(frozen=True)
class Call:
    """What a function was called with: a YAML file, and settings, which win, by dotted names.

    `loaded` is the model where one was given that is loaded already.
    """

    command: str
    config: Path | None
    flags: dict[str, Any]
    loaded: "LoadedModel | None" = None

    @classmethod
    def of(
        cls,
        command: str,
        config: PathLike | None,
        settings: Mapping[str, Any],
        loaded: "LoadedModel | None" = None,
    ) -> "Call":
        """Read keyword arguments; UserError for one that the command does not take.

        It names the nearest that there is. None is as good as none.
        """
        names = {keyword(path): path for path in TAKEN[command]}
        for name in sorted(settings.keys() - names.keys()):
            raise UserError(f"{command} takes no setting {name!r}{nearest(name, names)}")
        given = {names[n]: _plain(value) for n, value in settings.items() if value is not None}
        return cls(command, path_of(config), given, loaded)

    def spec(self, **place: bool) -> RunSpec:
        """Return the configuration; UserError with all that is wrong in it, or would do nothing.

        `place` is as in `check_effects`.
        """
        spec = load_spec(self.config, self.flags)
        check_effects(self.command, spec, self.flags, **place)
        if self.loaded is None:
            return spec
        own = spec_at_hand(self.loaded, spec.model, self.config)
        return spec.model_copy(update={"model": own})

    @contextmanager
    def job(
        self,
        output: PathLike | None,
        progress: ShowProgress,
        *,
        resume: bool = False,
        force_resume: bool = False,
        verify: bool = False,
    ) -> Iterator["Job"]:
        """Make a job with a run folder, or with none where `output` is None.

        With `resume` it is the run that lies there, `force_resume` also where it is another's work.
        """
        check_processes(self.command)
        show = shown(progress)
        folder, resume = path_of(output), resume or force_resume
        if resume:
            self._check_resumed(folder)
        if verify and folder is None:
            raise UserError("verify=True is for a run that can go on: give it a folder, output=...")
        spec = None
        if not resume:
            is_shown = type(show) is not Silent
            spec = self.spec(has_folder=folder is not None, is_shown=is_shown)

        def opened() -> tuple[AbstractContextManager[RunRecord], RunSpec]:
            if spec is None:
                assert folder is not None  # by _check_resumed
                forced = show.say if force_resume else None
                return Run.reopen(folder, self.command, self.flags, forced)
            if folder is None:
                return nullcontext(MemoryRecord()), spec
            return Run.prepare(folder, spec, self.command), spec

        def asked() -> dict[str, Any]:
            return flat(spec) if spec else {n: as_json(value) for n, value in self.flags.items()}

        with joint_run(opened, asked) as (run, own_spec):
            from swlora.job import Job

            yield Job(own_spec, run, show if world().is_main else Silent(), verify)

    def _check_resumed(self, folder: Path | None) -> None:
        """Raise UserError where it is not said which run goes on, or with what else it shall."""
        if folder is None:
            raise UserError("resume=True needs the run's folder: output=...")
        if self.config is not None:
            raise UserError(
                "resume=True continues with the settings in the run's config.yaml; leave out "
                "config, and give what shall change as keyword arguments"
            )


@overload
def path_of(given: PathLike) -> Path: ...


@overload
def path_of(given: PathLike | None) -> Path | None: ...


def path_of(given: PathLike | None) -> Path | None:
    """Return a path that was given as such or as a text, with ~ as a home folder."""
    return None if given is None else expanded(os.fspath(given))


def nearest(name: str, known: Collection[str]) -> str:
    """Return " (do you mean rank?)" for a name that is nearly one of the `known`, else nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (do you mean {near[0]}?)" if near else ""


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
