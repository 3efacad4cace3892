"""What lies in the folder of runs given at start: runs, the adapters in them, and studies.

Everything is found by walking that folder, links not followed; a request names what was found and
never a path. A name is the path below the folder, with "/" between its parts. Whatever a folder
holds, it costs no more than itself: it is named, and the others are shown.
"""

import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swlora.adapters.reach import switch_refusal
from swlora.adapters.saved import FACTS, WEIGHTS
from swlora.bounded_read import MAX_BYTES, UnreadableError, read_json_object
from swlora.config import BUILTIN_MODEL
from swlora.errors import UserError
from swlora.models.builtin import flag_of
from swlora.models.identity import name_elsewhere
from swlora.runs import Run, read_run
from swlora.study.folder import StudyFolder, read_study
from swlora.web.growing_metrics import MetricsFiles
from swlora.web.known_files import KnownFiles
from swlora.web.walk import walk
from swlora.work_folder import present_status

log = logging.getLogger("swlora.web")
RUN, STUDY = Run.file_name, StudyFolder.file_name
MAX_DEPTH = 5
MAX_FOLDERS = 5_000
FRESH_S = 2.0
# The part of a path before its last name; spaces may stand in it
_FOLDERS = re.compile(r"""(?<![^\s('"])/(?:[^/;,()'"]*/)+""")
FIGURE_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
ADAPTER_CONFIG = "adapter_config.json"
MAX_ADAPTER_JSON_BYTES = 4 << 20
MAX_SEPARATOR_CHARACTERS = 100
MAX_METRIC_ROWS = 20_000  # of one answer
METRICS_FILES = MetricsFiles()
_KNOWN = KnownFiles()


@dataclass(frozen=True)
class AdapterEntry:
    """A LoRA adapter on disk; `version` changes when the file is replaced.

    `format` says what its rows were: "text", "chat", or "" where that is not known.
    """

    name: str
    folder: Path = field(repr=False)
    version: int
    rank: int
    layers: tuple[int, ...] | None
    separator: str
    format: str = ""

    @property
    def is_e2e(self) -> bool:
        """Whether it was trained on E2E data, the only ones with something behind the prompt."""
        return bool(self.separator)

    def public(self) -> dict[str, Any]:
        """Return what a client may know."""
        layers = None if self.layers is None else list(self.layers)
        return {"name": self.name, "rank": self.rank, "layers": layers}


@dataclass(frozen=True)
class RunEntry:
    """A run folder, or a study's, by its name; `is_root`: it is the folder given at start."""

    name: str
    folder: Path = field(repr=False)
    is_root: bool = False

    def inner(self, place: str) -> str:
        """Return the name of the run at a place in this folder."""
        return place if self.is_root else f"{self.name}/{place}"


class RunFolders:
    """The runs and adapters below `root`; walked again when what is known is older than 2 s.

    A folder that is not there yet holds nothing. An adapter under `base_name`, by which clients
    ask for the base model, is not served.
    """

    def __init__(self, root: Path, base_name: str = "") -> None:
        self._root, self._base_name = root, base_name
        self._lock = threading.Lock()
        self._walked_s = float("-inf")
        self._runs: dict[str, RunEntry] = {}
        self._studies: dict[str, RunEntry] = {}
        self._adapters: dict[str, AdapterEntry] = {}
        self._not_served: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}

    def runs(self) -> dict[str, RunEntry]:
        """Return the run folders by name."""
        self._refresh()
        return self._runs

    def studies(self) -> dict[str, RunEntry]:
        """Return the folders of studies by name."""
        self._refresh()
        return self._studies

    def adapters(self) -> dict[str, AdapterEntry]:
        """Return the adapters by name: that of the run that holds them, or of their folder."""
        self._refresh()
        return self._adapters

    def not_served(self) -> dict[str, str]:
        """Return why the other adapters that lie there are not offered, by name."""
        self._refresh()
        return self._not_served

    def unreadable(self) -> dict[str, str]:
        """Return why the other runs and studies that lie there are not shown, by name."""
        self._refresh()
        return self._unreadable

    def _refresh(self) -> None:
        with self._lock:
            if time.monotonic() - self._walked_s < FRESH_S:
                return
            runs, studies = dict[str, RunEntry](), dict[str, RunEntry]()
            adapters, not_served = dict[str, AdapterEntry](), dict[str, str]()
            unreadable = dict[str, str]()
            walked = walk(self._root, max_depth=MAX_DEPTH, max_folders=MAX_FOLDERS)
            for name, folder, files in walked:
                for found, file_name, read in (
                    (runs, RUN, known_run),
                    (studies, STUDY, known_study),
                ):
                    if file_name in files:
                        with _noted(name, unreadable):
                            read(folder)
                            found[name] = RunEntry(name, folder, folder == self._root)
                if ADAPTER_CONFIG in files:
                    if folder.name == "adapter" and (folder.parent / RUN).is_file():
                        name = name.removesuffix("adapter").rstrip("/")
                        name = name or self._root.resolve().name
                    with _noted(name, not_served):
                        if name == self._base_name:
                            raise UserError("the base model is asked for by its name: rename it")
                        adapters[name] = read_adapter_entry(name, folder)
            for name in not_served.keys() - self._not_served.keys():
                log.warning("the adapter of %s is not served: %s", name, not_served[name])
            for name in unreadable.keys() - self._unreadable.keys():
                log.warning("%s is not shown: %s", name, unreadable[name])
            self._runs, self._studies, self._unreadable = runs, studies, unreadable
            self._adapters, self._not_served = adapters, not_served
            self._walked_s = time.monotonic()


def public_name(model: str) -> str:
    """Return what clients call a model: its Hub id, `builtin`, or the name of its folder."""
    flag = flag_of(model)
    return flag if flag == BUILTIN_MODEL else name_elsewhere(model)


def read_adapter_entry(name: str, folder: Path) -> AdapterEntry:
    """Return the adapter in `folder`; UserError, with the reason, where it is not served."""
    config, facts = _read_json(folder, ADAPTER_CONFIG), {}
    if os.path.lexists(folder / FACTS):
        facts = _read_json(folder, FACTS)
    if reason := switch_refusal(config):
        raise UserError(reason)
    rank, layers, separator = config.get("r"), facts.get("layers"), facts.get("separator", "")
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"its {ADAPTER_CONFIG} names no rank")
    if not isinstance(separator, str) or len(separator) > MAX_SEPARATOR_CHARACTERS:
        raise UserError(f"its {FACTS} names no separator of a usual length")
    try:
        weights = (folder / WEIGHTS).lstat()
    except OSError as error:
        raise UserError(f"it has no {WEIGHTS}") from error
    if not stat.S_ISREG(weights.st_mode):
        raise UserError(f"its {WEIGHTS} is no regular file")
    known = None
    if isinstance(layers, list) and all(isinstance(layer, int) for layer in layers):
        known = tuple(layers)
    format_ = _format(separator, facts.get("is_chat"))
    return AdapterEntry(name, folder, weights.st_mtime_ns, rank, known, separator, format_)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    return _known_json(folder / name, MAX_ADAPTER_JSON_BYTES)


def _known_json(path: Path, max_bytes: int) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        try:
            return read_json_object(path, max_bytes=max_bytes, follow_links=False)
        except UnreadableError as error:
            raise UserError(f"its {path.name} cannot be read: {error}") from error

    found: dict[str, Any] = _KNOWN.read(path, read)
    return found


def _format(separator: str, is_chat: Any) -> str:
    if separator or is_chat is False:
        return "text"
    return "chat" if is_chat is True else ""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever the content of a folder ends in into a UserError, and log what is not foreseen.

    Files of any kind may lie there, so the kinds of errors cannot be listed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        log.warning("%s cannot be shown", name, exc_info=error)
        raise UserError("it holds something that is not understood") from error


@contextmanager
def _noted(name: str, reasons: dict[str, str]) -> Iterator[None]:
    """Note by the name of a folder why its content cannot be read."""
    try:
        with reading(name):
            yield
    except UserError as error:
        reasons[name] = without_folders(str(error))


# What a run holds


def run_summary(entry: RunEntry) -> dict[str, Any]:
    """Return name, status and times of a run; UserError where run.json is gone or torn."""
    facts = known_run(entry.folder)
    names = ("status", "command", "seed", "started_at", "reason", "timings_s")
    summary = {"name": entry.name, **{name: facts.get(name) for name in names}}
    summary["status"], reason = present_status(entry.folder / RUN, facts), summary["reason"]
    return summary | {"reason": without_folders(reason) if isinstance(reason, str) else None}


def without_folders(text: str) -> str:
    """Return a text with every absolute path in it cut to its last part."""
    return _FOLDERS.sub("", text)


def run_metrics(entry: RunEntry, since: int) -> dict[str, Any]:
    """Return the lines of metrics.jsonl from number `since` on, and the number of the next."""
    rows, following = METRICS_FILES.of(entry.folder).part(since, MAX_METRIC_ROWS)
    return {"rows": rows, "next": following}


def known_run(folder: Path) -> dict[str, Any]:
    """Return run.json as `read_run` does; read again when it has changed."""
    found: dict[str, Any] = _KNOWN.read(folder / RUN, lambda: read_run(folder))
    return found


def known_study(folder: Path) -> dict[str, Any]:
    """Return study.json as `read_study` does; read again when it has changed."""
    found: dict[str, Any] = _KNOWN.read(folder / STUDY, lambda: read_study(folder))
    return found


def is_settled(entry: RunEntry) -> bool:
    """Say whether what a run ended with has been found by now, such as its adapter."""
    try:
        return time.time() - (entry.folder / RUN).stat().st_mtime >= FRESH_S
    except OSError:
        return False


def run_result(entry: RunEntry) -> dict[str, Any]:
    """Return result.json; empty where the run has come to none yet."""
    try:
        return _known_json(entry.folder / "result.json", MAX_BYTES)
    except UserError:
        return {}


def run_figures(entry: RunEntry) -> dict[str, Path]:
    """Return the figures that lie in a run folder, by file name."""
    return {
        path.name: path
        for path in sorted(entry.folder.iterdir())
        if path.suffix in FIGURE_TYPES and path.is_file() and not path.is_symlink()
    }
