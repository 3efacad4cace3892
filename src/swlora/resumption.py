"""What a run goes on with: the settings that its files hold, new ones, and what may differ.

run.json counts: where config.yaml says something else it was edited, or cut off, or a kill came
between the writing of the two, which is put right.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from swlora.config import RunSpec, dump_yaml, load_recorded_spec
from swlora.errors import UserError
from swlora.files import write_text
from swlora.run_place import CHECKPOINT, CONFIG
from swlora.run_settings import (
    OF_THE_CHECKPOINT,
    Change,
    Values,
    as_spec,
    changes_of,
    check_changeable,
    differences,
    flat,
    shown_differences,
)
from swlora.versions import package_versions
from swlora.work_folder import other_sources

ORIGINAL_CONFIG = "config.original.yaml"  # of a run whose settings were changed since
Told = Callable[[str], None]


class Resumption:
    """One process that goes on with the run in a folder.

    `facts` are those of its run.json, which are added to; `flags` are settings that change, by
    dotted names; `forced` is told of what differs from the run's beginning, where that is let
    through. Raises UserError for what differs otherwise, and for what cannot be changed.
    """

    def __init__(
        self, folder: Path, facts: dict[str, Any], flags: Values, forced: Told | None
    ) -> None:
        self._folder, self._facts, self._forced = folder, facts, forced
        self._extends = facts["status"] == "done"
        facts["resumed"] = facts.get("resumed", 0) + 1
        self._check_packages()
        self.spec, self._new = self._settings(flags)
        self._changes = changes_of(facts)

    @property
    def leaves_it_done(self) -> bool:
        """Whether the run was done, and nothing has changed that so far."""
        return self._extends and bool(self._new)

    def let_differ(self, now: Mapping[str, Any]) -> bool:
        """Say whether sources that differ are let through, after telling of those that do."""
        if self._forced is None:
            return False
        for difference in other_sources(self._facts, now):
            self._let_through(difference)
        return True

    def changes_from(self, n_done: int) -> list[Change]:
        """Return the changes of settings so far, with those that hold from step `n_done` on."""
        self._changes = changes_of(self._facts)
        if self._new:
            # Steps after `n_done` are done anew, where a damaged checkpoint was left out.
            self._changes = [replace(c, step=min(c.step, n_done)) for c in self._changes]
            self._changes.append(Change(n_done, self._new, self._extends))
        return self._changes

    def write(self, spec: RunSpec, record_start: Callable[[], None]) -> None:
        """Have the settings `spec` in the run's files.

        `record_start` writes run.json from the facts, as of a run that is at work here: one that
        was done is so from now on.
        """
        original = self._folder / ORIGINAL_CONFIG
        if self._new and not original.exists():
            began_with = flat(spec)
            for change in reversed(self._changes):
                began_with = change.undone(began_with)
            write_text(original, dump_yaml(as_spec(began_with)))
        self._facts["settings"] = flat(spec)
        if self._changes:
            self._facts["changes"] = [change.as_json() for change in self._changes]
        self._extends = False
        record_start()
        if self._new:
            write_text(self._folder / CONFIG, dump_yaml(spec))
            self._new = {}

    def _let_through(self, difference: str) -> None:
        assert self._forced is not None
        noted = {"resumed": self._facts["resumed"], "difference": difference}
        self._facts.setdefault("forced", []).append(noted)
        self._forced(f"goes on although {difference}")

    def _check_packages(self) -> None:
        """Compare the versions of the packages with those that the run began with."""
        now = package_versions()
        found = differences(self._facts.get("packages", {}), now)
        if not found:
            return
        said = shown_differences(found)
        if self._forced is None:
            raise UserError(
                f"this run cannot go on as it was: {said}; install what it began with, or add "
                "--force-resume to go on with other versions"
            )
        self._let_through(said)
        self._facts["packages"] = now

    def _settings(self, flags: Values) -> tuple[RunSpec, dict[str, tuple[Any, Any]]]:
        """Return the settings from here on, and (was, is) of those that are new."""
        path = self._folder / CONFIG
        written, noted = load_recorded_spec(path, {}), self._facts.get("settings")
        before: Values = noted or flat(written)  # older runs have noted none
        edited = differences(before, flat(written))
        changes = changes_of(self._facts)
        if edited and changes and not differences(changes[-1].undone(before), flat(written)):
            write_text(path, dump_yaml(as_spec(before)))  # a kill came between the two files
            edited = {}
        if edited:
            said = f"{path} is not as the run left it: {shown_differences(edited)}"
            if self._forced is None:
                raise UserError(
                    f"{said}; put that back, or give what shall change as flags beside --resume"
                )
            if others := OF_THE_CHECKPOINT & set(edited):
                raise UserError(
                    f"{said}; its checkpoint holds no such adapter, so put back "
                    f"{', '.join(sorted(others))}"
                )
            self._let_through(said)
        flags = {
            name: value for name, value in flags.items() if not self._repeats(name, value, before)
        }
        spec = load_recorded_spec(path, flags)
        found = differences(before, flat(spec))
        check_changeable(spec, {name: pair for name, pair in found.items() if name in flags})
        return spec, found

    def _repeats(self, name: str, value: Any, before: Values) -> bool:
        """Whether a flag names the number that the run itself chose when it began."""
        chosen = self._facts.get("fitted", {}).get(name.removeprefix("train."))
        return before.get(name) is None and chosen is not None and value == chosen


def nothing_to_resume(folder: Path) -> str:
    """Say that a run is done, and how it could go on."""
    return f"the run in {folder} is done; there is nothing to resume (more --epochs go on with it)"


def check_resumable(
    folder: Path, facts: Mapping[str, Any], result: Mapping[str, Any], command: str, flags: Values
) -> None:
    """Raise UserError where a run cannot go on, by its run.json and its result.json."""
    if facts["status"] == "done":
        if not flags:
            raise UserError(nothing_to_resume(folder))
        _check_extendable(folder, result, flags)
    if facts["command"] != command:
        raise UserError(f"{folder} holds a run of {facts['command']}, not of {command}")
    if not (folder / CONFIG).exists():
        raise UserError(
            f"the run in {folder} was stopped before it began; start it again, with its "
            "settings and without --resume"
        )


def _check_extendable(folder: Path, result: Mapping[str, Any], flags: Values) -> None:
    """Raise UserError where a run that is done cannot be trained on, by its result.json."""
    if not any((folder / CHECKPOINT).glob("state-*.safetensors")):
        raise UserError(
            f"the run in {folder} is done and holds no checkpoint (older versions kept none, nor "
            f"does --method full); `swlora train --adapter {folder}` starts a new run from its "
            "adapter"
        )
    trained = result.get("train", {})
    ended_early = trained.get("steps", 0) < trained.get("planned_steps", 0)
    if ended_early and "train.early_stopping" not in flags:
        raise UserError(
            f"the training in {folder} ended early, after {trained['steps']} of "
            f"{trained['planned_steps']} steps; a larger --early-stopping goes on with it"
        )
