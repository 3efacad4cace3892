"""A folder that one process at a time works in, and the file in it that says how things stand.

The folder of a run and that of a study are such folders. The file, run.json or study.json, holds
"status", when, on which machine and with which packages the work began, and whatever else is
recorded. Where the work broke off it has the "reason" for people and "error" {code, message} for
programs.
"""

import platform
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

from swlora.errors import DivergedError, UserError, error_code
from swlora.files import read_json, write_json
from swlora.locks import Lock, is_abandoned, lock_folder
from swlora.versions import package_versions

Status = Literal["running", "done", "failed", "incomplete", "cancelled"]
_OTHER_TOKENS = (
    "its rows become other tokens than when it began: put back the tokenizer and the chat template "
    "in the model's folder, or the swlora that it began with (`packages` in its run.json)"
)
# What differs and what to do, beside beginning again
_REMEDIES = {
    "base_weights_sample_sha256": "put the weights that it began with back",
    "weights_sha256": "put the model's file back",
    "tokenizer_sha256": "put back the tokenizer and the chat template in the model's folder",
    "start_adapter_sha256": "put back the adapter that it started from",
    "computes": (
        "go on where it computes as before (CUDA_VISIBLE_DEVICES= hides a GPU), or add "
        "--force-resume"
    ),
    "data_sha256": "its rows are others: put back the data",
    "train_tokens_sha256": _OTHER_TOKENS,
    "held_out_tokens_sha256": _OTHER_TOKENS,
}
MAX_FACTS_BYTES = 4 << 20
KILLED = "killed"  # the status that work has whose process is gone without a word
KILLED_SAID = (
    "its process is gone, though the work had not come to its end: it was killed, by the system "
    "for want of memory, say, or the machine went down"
)
_TYPE_OF_ERROR = re.compile(r"^\w+(Error|Interrupt): ")


class WorkFolder(ABC):
    """A folder with facts in a file, locked while this process works in it."""

    work: ClassVar[str]  # how messages call what is done here
    file_name: ClassVar[str]  # of the facts
    status_after_error: ClassVar[Status]

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self._lock = Lock(None)

    def record(self, **facts: Any) -> None:
        """Add facts to the file."""
        self.facts.update(facts)
        self._save()

    def record_source(self, **facts: Any) -> None:
        """Record what is worked on; UserError where it was something else when the work began."""
        if difference := other_source(self.facts, facts):
            raise UserError(
                f"this {self.work} cannot go on: {difference}, or begin again in another --output"
            )
        self.record(**facts)

    def _save(self) -> None:
        write_json(self.folder / self.file_name, self.facts)

    def _take(self) -> None:
        """Lock the folder; UserError where another process is at work in it."""
        self._lock = lock_folder(self.folder)

    def _record_start(self) -> None:
        """Record that the work is under way, and no more how it ended before."""
        for name in ("reason", "error"):
            self.facts.pop(name, None)
        self.record(status="running", host=platform.node())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._end(error)
        finally:
            self._lock.release()

    @abstractmethod
    def _end(self, error: BaseException | None) -> None:
        """Record how the work ended, with an error or without."""

    def _note_error(self, error: BaseException) -> None:
        """Put into the facts how an error ended the work; `_save` is still to come."""
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        kind = type(error).__name__
        self.facts["status"] = "cancelled" if stopped else self.status_after_error
        self.facts["reason"] = f"{kind}: {error}".strip(": ")
        self.facts["error"] = {"code": error_code(error), "message": str(error) or kind}


@dataclass(frozen=True)
class Failure:
    """Why work broke off: a code of `swlora.errors` ("" where it is not known), a message."""

    code: str
    message: str


def failure_of(facts: Mapping[str, Any]) -> Failure | None:
    """Return why the work of these facts broke off, or None.

    Folders of older versions hold the reason alone; its words are read here and nowhere else.
    """
    error, reason = facts.get("error"), facts.get("reason")
    if isinstance(error, dict):
        return Failure(str(error.get("code", "")), str(error.get("message", "")))
    if not isinstance(reason, str):
        return None
    code = DivergedError.code if "not finite" in reason else ""
    return Failure(code, _TYPE_OF_ERROR.sub("", reason))


def _short(value: Any) -> str:
    """Return the beginning of a hash, any other value whole."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def other_source(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say in what the source of some work differs from what it was, and what to do; None if not."""
    for name, value in now.items():
        if difference := _difference(before, name, value):
            return f"{difference}; {_REMEDIES.get(name.partition(' ')[0], 'put back what it was')}"
    return None


def other_sources(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return all that differs, without what to do."""
    return [said for name, value in now.items() if (said := _difference(before, name, value))]


def _difference(before: Mapping[str, Any], name: str, value: Any) -> str | None:
    if (noted := before.get(name, value)) == value:
        return None
    return f"{name} was {_short(noted)} and is now {_short(value)}"


def present_status(file: Path, facts: Mapping[str, Any]) -> str:
    """Return the status of the work whose facts were read in a file: KILLED where it was killed.

    The file cannot say so: a process that is killed writes nothing. It leaves the lock, which is
    not seen from another machine.
    """
    status, here = str(facts["status"]), platform.node()
    if status != "running" or facts.get("host", here) != here or not is_abandoned(file.parent):
        return status
    try:  # it may have ended between the reading and the look at the lock
        return KILLED if read_facts(file, ("status",))["status"] == "running" else status
    except UserError:
        return status


def read_facts(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """Read the facts in a file; UserError where it cannot be read or lacks one that is needed."""
    facts = read_json(path, max_bytes=MAX_FACTS_BYTES)
    if not facts.keys() >= set(needed):
        raise UserError(f"{path.parent} holds no readable {path.name}")
    return facts


def facts_of_now() -> dict[str, Any]:
    """Return when and where work begins, and with which versions of Python and of the packages."""
    return {
        "host": platform.node(),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": package_versions(),
        "python": platform.python_version(),
    }
